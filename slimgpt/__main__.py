"""The command line: ``slimgpt``, and ``python -m slimgpt``, which torchrun starts.

It lives in ``flows.cli``. Only its door is here, and opens it by name: a project may hold a ``flows.py``, a ``tasks``
or a ``deploy`` of its own, which Python would find first; none holds a ``slimgpt``.
"""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find_ours_first() -> None:
    """Where others have the names of our packages, look beside this one first, in the processes started from here too.

    Elsewhere nothing changes: where this package is installed, libraries are as well, and those of PYTHONPATH go first.
    """
    names = ("deploy", "flows", "tasks")
    specs = [find_spec(name) for name in names]
    if all(spec and spec.origin and ROOT in Path(spec.origin).parents for spec in specs):
        return
    sys.path.insert(0, str(ROOT))
    others = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([others] if others else [])])


def main() -> None:
    """Run the command line with this process's arguments."""
    find_ours_first()
    import_module("flows.cli.app").main()


if __name__ == "__main__":
    main()
