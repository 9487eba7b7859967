"""Real registries: SQLite in a folder, and an MLflow server that hands out artifacts itself."""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from deploy.serving.server import check_port, stop_session
from tasks.environment import Workspace
from tasks.registry.client import make_database


@dataclass
class MlflowServer:
    """A server that can be killed and started again on the same port and files."""

    place: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.place}/db"]
        command += ["--artifacts-destination", str(self.place / "artifacts")]
        with (self.place / "log").open("ab") as log:
            own = {"cwd": self.place, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.process = subprocess.Popen(command, **own)
        while True:  # pytest's own time limit bounds it
            assert self.process.poll() is None, (self.place / "log").read_text()[-2000:]
            try:
                with urlopen(f"{self.url}/health", timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(0.1)

    def stop(self) -> None:
        stop_session(self.process)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), int(check_port("127.0.0.1", 0)))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory):
    """MLflow's database as it begins; to make it takes MLflow a second."""
    file = tmp_path_factory.mktemp("registry") / "mlflow.db"
    make_database(f"sqlite:///{file}", (file.parent / "mlflow-artifacts").as_uri())
    return file


@pytest.fixture
def workspace(tmp_path, monkeypatch, empty_registry):
    """A workspace whose registry is an SQLite file."""
    shutil.copyfile(empty_registry, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return Workspace.at(tmp_path)


@pytest.fixture
def served_workspace(tmp_path, monkeypatch, mlflow_server):
    """A workspace whose registry is the server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)
    return Workspace.at(tmp_path)


@pytest.fixture
def own_server(tmp_path, monkeypatch):
    """A server that a test may kill; who waits for it gives up after one more try."""
    server = MlflowServer(tmp_path, int(check_port("127.0.0.1", 0)))
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    yield server
    server.stop()
