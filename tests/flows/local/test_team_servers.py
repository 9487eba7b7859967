"""`make up` on PostgreSQL and S3 as docs/flows.md says: what lies where, and what is kept out."""

import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from flows.local import stores
from slimgpt.files import folder_sha256
from tasks.environment import Workspace
from tasks.registry.client import set_alias
from tasks.registry.fetching import fetch_model
from tests import processes
from tests.flows.local.test_local import EVALUATION, PRUNE, ROOT, Servers
from tests.tasks.registry import finished_run
from tests.tiny_models import write_dense

pytestmark = pytest.mark.slow
PREFECT, DATABASE = stores.DATABASE["prefect"][0], stores.DATABASE["mlflow"][0]


@pytest.fixture(scope="module")
def team(variables, tmp_path_factory):
    servers = Servers(tmp_path_factory.mktemp("team"))
    servers.environment.update(variables)
    try:
        servers.up_output = servers.local("up")
        yield servers
    finally:
        servers.local("down")


@pytest.fixture(scope="module")
def run(team, tmp_path_factory):
    """A compression by the worker; its folder."""
    tiny = write_dense(tmp_path_factory.mktemp("model") / "tiny")
    team.wait(team.run(model=str(tiny), prune=PRUNE, evaluation=EVALUATION), "COMPLETED")
    (folder,) = (team.root / "tiny-slim").iterdir()
    return folder


def test_state_is_in_postgresql_and_weights_in_the_bucket(
    team, run, postgres, bucket, variables, tmp_path, monkeypatch
):
    assert ("compress", "COMPLETED") in postgres.ask(
        "prefect", "select f.name, r.state_type::text from flow_run r join flow f on f.id = r.flow_id"
    )
    deployments = {item["name"] for item in team.ask("deployments/filter", {})}
    assert {name for (name,) in postgres.ask("prefect", "select name from deployment")} == deployments >= {"compress"}
    assert postgres.ask("mlflow", "select name, version from model_versions") == [("tiny-slim", 1)]
    assert [path for path in team.root.rglob("*") if path.suffix == ".db"] == []
    assert not (team.root / "mlflow-artifacts").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.mlflow)
    fetched = fetch_model("models:/tiny-slim@challenger", Workspace.at(tmp_path))
    assert folder_sha256(fetched) == folder_sha256(run / "bundle" / "model")
    weights = {path.name: path.read_bytes() for path in fetched.glob("*.safetensors")}
    kept = {key.rpartition("/")[2]: content for key, content in bucket.contents().items()}
    assert weights and weights.items() <= kept.items()


def test_two_processes_registering_one_name_end_with_two_complete_versions_and_one_alias(
    team, run, tmp_path, monkeypatch
):
    both, logs = [], [tmp_path / f"{number}.log" for number in (1, 2)]
    for number, log in enumerate(logs, 1):
        own = shutil.copytree(run, tmp_path / str(number) / "run")
        runs = tmp_path / "runs" / str(number)
        both.append(processes.start(finished_run.in_process, own, "twins-slim", runs, team.api, team.mlflow, log))
    for process, log in zip(both, logs, strict=True):
        process.join()
        assert process.exitcode == 0, log.read_text()
    registry = MlflowClient(team.mlflow)
    versions = registry.search_model_versions("name='twins-slim'")
    assert {(str(version.version), version.status) for version in versions} == {("1", "READY"), ("2", "READY")}
    assert list(registry.get_registered_model("twins-slim").aliases) == ["challenger"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", team.mlflow)
    for number in (1, 2):
        fetched = fetch_model(f"models:/twins-slim/{number}", Workspace.at(tmp_path))
        assert folder_sha256(fetched) == folder_sha256(run / "bundle" / "model")


def test_a_new_alias_that_three_set_at_once_is_set(team):
    registry = MlflowClient(team.mlflow)
    model = registry.create_logged_model(registry.create_experiment("aliases"), "model").model_id
    registry.finalize_logged_model(model, LoggedModelStatus.READY)

    def set_one(name, version, together):
        together.wait()
        set_alias(MlflowClient(team.mlflow), name, "challenger", version)

    with ThreadPoolExecutor(3) as threads:
        for name in (f"new-{i}" for i in range(15)):
            registry.create_registered_model(name)
            versions = [registry.create_model_version(name, f"models:/{model}", model_id=model) for _ in range(3)]
            together = threading.Barrier(3)
            calls = [threads.submit(set_one, name, version.version, together) for version in versions]
            for call in calls:
                call.result()  # raises what it raised
            assert list(registry.get_registered_model(name).aliases) == ["challenger"]


def test_passwords_and_keys_are_with_their_server_alone(team, run, postgres, bucket, variables):
    secrets = ("planted0", variables["AWS_SECRET_ACCESS_KEY"])
    processes = {name: psutil.Process(team.pid(name)) for name in ("prefect", "mlflow", "worker")}
    known = {name: [secret for secret in secrets if secret in str(p.environ())] for name, p in processes.items()}
    assert known == {"prefect": ["planted0"], "mlflow": list(secrets), "worker": []}
    assert PREFECT not in processes["mlflow"].environ()
    assert DATABASE not in processes["prefect"].environ()
    printed = {"up": team.up_output, "status": team.local("status")}
    printed["command lines"] = "\n".join(" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    printed |= {database: postgres.dump(database) for database in ("prefect", "mlflow")}
    printed |= {str(path): path.read_text(errors="replace") for path in team.root.rglob("*") if path.is_file()}
    printed |= {key: content.decode(errors="replace") for key, content in bucket.contents().items()}
    assert "tiny-slim" in printed["prefect"] and "tiny-slim" in printed["mlflow"]  # it would be found
    assert "state: postgresql+asyncpg://slimgpt@127.0.0.1" in printed["up"]
    assert [where for where, text in printed.items() if any(secret in text for secret in secrets)] == []


def test_up_on_other_variables_is_refused_and_what_runs_goes_on(team):
    other = {**team.environment, "MLFLOW_BACKEND_STORE_URI": ""}
    command = [sys.executable, "-m", "flows.local", "up"]
    done = subprocess.run(command, env=other, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(
        r"error: mlflow runs with its state in postgresql\+psycopg2://slimgpt@127.0.0.1:\d+/mlflow and "
        r"s3://slimgpt/mlflow; `make down` before it uses SQLite and s3://slimgpt/mlflow",
        line,
    )
    assert requests.get(f"{team.mlflow}/health", timeout=60).ok
