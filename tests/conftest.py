"""What every test shares: nothing is written outside a temporary folder; one real Prefect server a session."""

import contextlib
import os
import shutil
import subprocess
import tempfile

import pytest

# Set before anything imports Prefect, which reads its settings then; children that tests start inherit it.
_HOME = tempfile.mkdtemp(prefix="slimgpt-tests-")
os.environ["SLIMGPT_RUNS"] = f"{_HOME}/runs"
os.environ["PREFECT_HOME"] = f"{_HOME}/prefect"
os.environ.pop("MLFLOW_TRACKING_URI", None)
# Each process of ``-n 2`` takes its share of the cores: OpenMP's threads spin while they wait for one another.
# Not the process that starts them: they would inherit its own, which is all cores.
if count := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))

from tasks.environment import prepare  # noqa: E402

prepare()


def pytest_unconfigure():
    shutil.rmtree(_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """What takes longest comes first: else ``-n 2`` ends with one process at work and one at rest."""
    items.sort(key=lambda item: (item.get_closest_marker("vllm") is None, item.get_closest_marker("slow") is None))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For ``-n 2``: a file's tests stay together, and the files marked ``vllm`` take turns.

    xdist's own groups do not reach its scheduler in pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # it would put the files with the fewest tests, the slowest ones, last

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "vllm" if "pytest.mark.vllm" in (config.rootpath / file).read_text() else file

    return ByFile(config, log)


@pytest.fixture(scope="session")
def prefect_server():
    """A real Prefect server with a database of its own."""
    from prefect.testing import utilities

    from flows.prefect_api import OwnServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilities, "SubprocessASGIServer", OwnServer)  # as a command starts it
        with utilities.prefect_test_harness(server_startup_timeout=120):
            yield


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
