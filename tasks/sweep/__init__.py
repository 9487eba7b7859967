"""A sweep: its grid, its runners, its points, their comparison and record."""
