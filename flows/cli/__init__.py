"""The command line: ``slimgpt``, and ``python -m slimgpt``, which opens it."""
