"""Passwords and tokens of the environment are in no file, no database and no line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks.registry import finished_run
from tests.team_servers import free_port

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run.make(tmp_path_factory.mktemp("finished"))


SECRETS = {
    "HF_TOKEN": "hf_planted0token",
    "MLFLOW_TRACKING_TOKEN": "",
    "AWS_SECRET_ACCESS_KEY": "aws0planted0key",
    "PREFECT_API_KEY": "pnu_planted0key",
    "DATABASE_URL": "postgresql://someone:planted0database@localhost/db",
}


@pytest.mark.slow
@pytest.mark.parametrize("answers", [True, False])
def test_planted_secrets_show_up_nowhere(run, request, tmp_path, prefect_server, answers):
    # where none answers, MLflow's message names the address
    server = request.getfixturevalue("own_server") if answers else None
    url = server.url if server else f"http://127.0.0.1:{free_port()}"
    uri = url.replace("http://", "http://planted0user:planted0password@")
    command = [sys.executable, "-m", "tests.tasks.registry.finished_run", str(run), "tiny-slim", str(tmp_path / "runs")]
    variables = {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri, **SECRETS}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert (done.returncode == 0) == answers, done.stdout
    if server:
        server.stop()
    places = [path for path in (*tmp_path.rglob("*"), *run.rglob("*")) if path.is_file()]
    if answers:
        assert any(b"tiny-slim" in path.read_bytes() for path in places if path.name.startswith("db"))
        assert any(path.name == "report.html" for path in places)
    assert "planted0" not in done.stdout
    assert [path for path in places if b"planted0" in path.read_bytes()] == []
