import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.tiny_models import write_dense

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


@pytest.mark.parametrize(
    "command",
    [[sys.executable, "-m", "slimgpt"], [str(Path(sys.executable).with_name("slimgpt"))]],
    ids=["-m", "script"],
)
def test_a_project_may_hold_modules_of_our_names(tmp_path, command):
    for name in ("deploy.py", "flows.py", "tasks.py"):
        (tmp_path / name).write_text("raise SystemExit('a module of the project was run')")
    write_dense(tmp_path / "model")
    done = subprocess.run(
        [*command, "inspect", "model"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 0 and "not pruned" in done.stdout, done.stderr
    # so do the processes that it starts: servers, and vLLM with our plugin
    code = "import subprocess, sys\nfrom slimgpt.__main__ import find_ours_first\nfind_ours_first()\n"
    code += "subprocess.run([sys.executable, '-P', '-c', 'import deploy.engines.vllm_entry, flows, tasks'], check=True)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": "."})


def test_nothing_is_put_first_where_no_project_has_our_names(tmp_path):
    code = "import os, sys\nfrom slimgpt.__main__ import find_ours_first\nbefore = [*sys.path]\nfind_ours_first()\n"
    code += "assert sys.path == before and 'PYTHONPATH' not in os.environ"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment)


def test_no_file_of_ours_hides_a_library():
    # `flows/x.py:flow` puts the file's folder first on sys.path: and hides libraries
    libraries = set(packages_distributions()) | set(sys.stdlib_module_names) | set(FOLDERS) | {"evaluate", "tasks"}
    ours = [path for folder in FOLDERS[1:] for path in (ROOT / folder).rglob("*.py")]
    names = {path.stem for path in ours} | {path.parent.name for path in ours} - set(FOLDERS)
    assert len(names) > 50
    assert sorted(names & libraries - {"__init__", "__main__"}) == []
