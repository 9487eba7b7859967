"""The paired benchmark: dense against pruned, and how much of what could be saved was saved."""
