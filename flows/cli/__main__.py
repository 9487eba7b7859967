"""``python -m flows.cli``, which torchrun starts."""

from flows.cli.app import main

main()
