"""What tests of serving share."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


@pytest.fixture
def stock_python(tmp_path: Path) -> Path:
    """A Python that has every installed package but ours."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        # .pth files are read in a venv's own folder only, so an editable install of ours stays out as well.
        if not entry.name.lower().startswith(("slimgpt", "deploy", "tasks", "flows")):
            (packages / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=300)
    python = tmp_path / "venv/bin/python"
    purelib = [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site = Path(subprocess.run(purelib, capture_output=True, text=True, check=True, timeout=300).stdout.strip())
    (site / "stock.pth").write_text(f"{packages}\n")
    return python
