import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("slimgpt", "deploy", "tasks", "flows")


def test_our_packages_are_ours_from_another_folder(tmp_path):
    code = f"import {', '.join(FOLDERS)}\nfor package in ({', '.join(FOLDERS)}): print(package.__file__)"
    # the test's own root first on the path, as an installation of this checkout has it
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert [Path(line) for line in result.stdout.split()] == [ROOT / package / "__init__.py" for package in FOLDERS]


def test_no_file_of_ours_hides_a_library():
    # `flows/x.py:flow` puts the file's folder first on sys.path: and hides libraries
    libraries = set(packages_distributions()) | set(sys.stdlib_module_names) | set(FOLDERS) | {"evaluate", "tasks"}
    ours = [path for folder in FOLDERS[1:] for path in (ROOT / folder).rglob("*.py")]
    names = {path.stem for path in ours} | {path.parent.name for path in ours} - set(FOLDERS)
    assert len(names) > 50
    assert sorted(names & libraries - {"__init__", "__main__"}) == []
