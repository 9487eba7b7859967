"""What every test shares: nothing is written outside a temporary folder; one real Prefect server a session."""

import os
import shutil
import tempfile

import pytest

# Set before anything imports Prefect, which reads its settings then; children that tests start inherit it.
_HOME = tempfile.mkdtemp(prefix="slimgpt-tests-")
os.environ["SLIMGPT_RUNS"] = f"{_HOME}/runs"
os.environ["PREFECT_HOME"] = f"{_HOME}/prefect"
os.environ.pop("MLFLOW_TRACKING_URI", None)

from tasks.environment import prepare  # noqa: E402

prepare()


def pytest_unconfigure():
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def prefect_server():
    """A real Prefect server with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
