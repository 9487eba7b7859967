"""The mathematics on matrices and numbers: Optimal Brain Surgeon, which units go, how many go where."""
