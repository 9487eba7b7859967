"""What every test shares: nothing is written outside a temporary folder; one real Prefect server a process.

``pytest -n`` runs several processes at once, vLLM included: see ``tests/vllm_environment.py``.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile

import pytest

# Set before anything imports Prefect, which reads its settings then; children that tests start inherit it.
_HOME = tempfile.mkdtemp(prefix="slimgpt-tests-")
os.environ["SLIMGPT_RUNS"] = f"{_HOME}/runs"
os.environ["PREFECT_HOME"] = f"{_HOME}/prefect"
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Each process of ``-n`` takes its share of the cores: OpenMP's threads spin while they wait for one another.
# Not the process that starts them: they would inherit its own, which is all cores.
if count := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))

from deploy.engines.vllm_entry import collect_seldom  # noqa: E402
from slimgpt.checkpoints.source import built_in_folder  # noqa: E402
from tasks.environment import prepare  # noqa: E402
from tests import vllm_environment  # noqa: E402

os.environ |= vllm_environment.QUICK
# As in flows/local: seven processes for LLM judges, each of which imports MLflow for seconds, and which nothing uses.
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
prepare()
_BUILT_IN = built_in_folder()
os.environ["SLIMGPT_CACHE"] = f"{_HOME}/cache"
if _BUILT_IN.is_dir():  # conversion takes half a minute
    built_in_folder().parent.mkdir()
    built_in_folder().symlink_to(_BUILT_IN)
collect_seldom()  # as flows and servers do
# A shell that starts the tests in the background has Ctrl-C ignored, and processes inherit that: servers that end
# themselves by it would be waited for.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure():
    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """The longest files come first: else ``-n`` ends with one process at work and the others at rest."""
    markers = ("minutes", "vllm", "slow")
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in markers])


@pytest.fixture(scope="session")
def prefect_server():
    """A real Prefect server with a database of its own."""
    from prefect.testing import utilities

    from flows.prefect_api import OwnServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilities, "SubprocessASGIServer", OwnServer)  # as a command starts it
        with utilities.prefect_test_harness(server_startup_timeout=120):
            yield


@pytest.fixture(scope="session")
def pruned_family(tmp_path_factory):
    """``pruned_family(case)``: that tiny family dense and pruned, made once for all processes. Nobody changes them."""
    from tests.tiny_families import pruned_once

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return lambda case: pruned_once(shared / "families", case)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of a given size, such as ``"1M"``, that is gone afterwards."""

    @contextlib.contextmanager
    def mounted(size):
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"mounting a small file system needs root here: {done.stderr.decode().strip()}")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)

    return mounted
