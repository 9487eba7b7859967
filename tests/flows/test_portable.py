"""Windows, as far as it can be tried here: Python without the modules and calls that only POSIX has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimgpt.report import load_report
from tests.tiny_models import write_dense

# Libraries have code for Windows that Linux does not run: the modules are hidden from this project alone.
WITHOUT = """
import builtins, os, signal
real = builtins.__import__
def without(name, globals=None, *rest, **more):
    importer = (globals or {}).get("__name__", "").partition(".")[0]
    if name in ("fcntl", "resource", "pwd", "grp", "termios") and importer in ("slimgpt", "deploy", "tasks", "flows"):
        raise ModuleNotFoundError(name)
    return real(name, globals, *rest, **more)
builtins.__import__ = without
gone = ((os, ("O_DIRECTORY", "getsid", "killpg", "sched_getaffinity")), (signal, ("SIGHUP", "SIGKILL")))
for module, names in gone:
    for name in names:
        delattr(module, name)
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    search = os.pathsep.join((str(tmp_path / "site"), str(Path(__file__).parents[2])))

    def python(*words):
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env={**os.environ, "PYTHONPATH": search},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return python


def test_a_model_is_pruned_and_looked_at(run, tmp_path):
    dense, out = write_dense(tmp_path / "tiny", num_hidden_layers=2), tmp_path / "out"
    small = ["--calibration", "python", "--num-samples", "4", "--seq-len", "64", "--ffn-multiple", "4"]
    run("-m", "slimgpt", "prune", dense, out, *small)
    report = load_report(out)
    assert report.ratio == pytest.approx(0.25, abs=0.005)
    assert report.peak_memory_bytes > 0
    assert "FFN" in run("-m", "slimgpt", "inspect", out)


def test_two_processes_do_not_write_one_folder(run, tmp_path):
    printed = run(
        "-c",
        "import sys, pathlib\nfrom slimgpt.files import locked\nfolder = pathlib.Path(sys.argv[1])\n"
        "with locked(folder):\n    try:\n        locked(folder).__enter__()\n"
        "    except BlockingIOError as error:\n        print(error)",
        tmp_path,
    )
    assert printed.startswith(f"another process is writing to {tmp_path}; wait for it or choose another OUT")


def test_the_flows_can_be_imported(run):
    run(
        "-c",
        "import flows.compress, flows.sweep, flows.benchmark, flows.promote, flows.local, deploy.serving.foreground",
    )
