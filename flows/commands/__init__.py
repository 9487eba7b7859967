"""The commands of ``slimgpt``, by what they do; flows/cli.py puts them together."""
