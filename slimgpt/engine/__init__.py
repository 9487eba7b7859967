"""Walks a model layer by layer: plan, prune, resume."""
