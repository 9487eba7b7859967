"""The runs of the paper as config files, a folder for each table, and what they are measured by."""
