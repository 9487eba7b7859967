"""A registry behind a real MLflow server: a version is downloaded once, and a new version is another one."""

import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from mlflow.entities import LoggedModelStatus

from deploy.serving.server import check_port, stop_session
from tasks.environment import Workspace
from tasks.registry.client import open_client
from tasks.registry.fetching import fetch_model
from tasks.registry.names import MODEL_PATH
from tests.tiny_models import write_dense


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL and artifact folder of a server that hands out artifacts itself."""
    place = tmp_path_factory.mktemp("mlflow")
    port = check_port("127.0.0.1", 0)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", 1]
    command += ["--backend-store-uri", f"sqlite:///{place}/db", "--artifacts-destination", place / "artifacts"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [*map(str, command)], cwd=place, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while True:  # pytest's own time limit bounds it
            assert process.poll() is None, (place / "log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", place / "artifacts"
    finally:
        stop_session(process)


def test_a_version_is_downloaded_once_and_a_new_one_beside_it(server, tmp_path, monkeypatch):
    url, artifacts = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    workspace = Workspace.at(tmp_path / "runs")
    client = open_client(workspace)
    experiment = client.create_experiment("served")
    client.create_registered_model("tiny")

    def register(folder: Path) -> str:
        model_id = client.create_logged_model(experiment, "model").model_id
        client.log_model_artifacts(model_id, str(folder), MODEL_PATH)
        client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        version = client.create_model_version("tiny", f"models:/{model_id}", model_id=model_id)
        client.set_registered_model_alias("tiny", "champion", version.version)
        return model_id

    def contents(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    first, second = (write_dense(tmp_path / name, num_hidden_layers=1, seed=i) for i, name in enumerate(("a", "b")))
    (workspace.fetched / f".{register(first)}.partial-left" / "model").mkdir(parents=True)  # by a killed download
    fetched = fetch_model("models:/tiny@champion", workspace)
    assert fetched.is_relative_to(workspace.fetched) and contents(fetched) == contents(first)
    shutil.rmtree(artifacts)  # what is asked for again cannot come from the server
    assert fetch_model("models:/tiny@champion", workspace) == fetched
    register(second)
    newer = fetch_model("models:/tiny@champion", workspace)
    assert newer != fetched and contents(newer) == contents(second)
    assert fetch_model("models:/tiny/1", workspace) == fetched
    assert {folder.name for folder in workspace.fetched.iterdir()} == {fetched.name, newer.name}  # nothing half-done
    register(first)
    shutil.rmtree(artifacts)
    with pytest.raises(ConnectionError, match=r"MLflow failed while models:/tiny/3 was fetched \(404 Client Error: "):
        fetch_model("models:/tiny/3", workspace)
    assert {folder.name for folder in workspace.fetched.iterdir()} == {fetched.name, newer.name}
