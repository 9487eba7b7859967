"""The command line: ``slimgpt``, and ``python -m flows.cli`` for torchrun."""
