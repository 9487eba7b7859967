"""A Python of its own that has chosen packages of this environment and nothing else, for tests of what they can do."""

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def isolated_python(folder: Path, wanted: Iterable[str]) -> Path:
    """A venv in ``folder`` with these distributions and what they need, as links; no download. Returns its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=300)
    python = folder / "bin/python"
    purelib = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = Path(subprocess.run(purelib, capture_output=True, text=True, check=True, timeout=300).stdout.strip())
    for name in _needed(wanted):
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
    return python


def _needed(wanted: Iterable[str]) -> set[str]:
    """The names of ``wanted`` and, recursively, of what they ask for on this machine without extras."""
    names: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in names:
            names.add(name)
            needs = map(Requirement, distribution(name).requires or ())
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return names
