"""`make up` as a user runs it: real servers, a real worker, `prefect deployment run` on a tiny random model."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from prefect.client.base import PrefectHttpxSyncClient

from deploy.engines.availability import vllm_obstacle
from deploy.serving.server import session_members
from flows.local.machine import Local
from slimgpt.report import load_report
from tests.flows.documents.test_readme import DOCS, commands
from tests.tiny_models import write_dense

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.minutes]
ROOT = Path(__file__).parents[3]
EVALUATION = {"tasks": [], "perplexity": "python", "seq_len": 64, "max_blocks": 2}
PRUNE = {"num_samples": 4, "seq_len": 64, "calibration": "python", "ffn_multiple": 4}


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Servers:
    """The services in a folder of their own, seen from outside."""

    def __init__(self, root):
        self.root = root
        ports = {"PREFECT_PORT": str(_free_port()), "MLFLOW_PORT": str(_free_port())}
        self.api = f"http://127.0.0.1:{ports['PREFECT_PORT']}/api"
        self.client = PrefectHttpxSyncClient(base_url=self.api, timeout=300)  # asks again after a 503, as users' does
        self.mlflow = f"http://127.0.0.1:{ports['MLFLOW_PORT']}"
        # A user's environment: nothing that this process's own Prefect and MLflow need.
        user = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        polls = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_RUNNER_POLL_FREQUENCY": "2", "OMP_NUM_THREADS": "1"}
        polls["PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS"] = "2"  # else 60: a time before that is passed over
        # While this file is there, the machine has no vLLM: to start it is not what most of these tests are about.
        self.without_vllm = root / "without-vllm"
        self.without_vllm.touch()
        (root / "site").mkdir()
        (root / "site" / "sitecustomize.py").write_text(
            f"import os, sys\nif os.path.exists({str(self.without_vllm)!r}): sys.modules['vllm'] = None\n"
        )
        python_path = os.pathsep.join((str(root / "site"), str(ROOT)))
        self.environment = {**user, **ports, **polls, "SLIMGPT_RUNS": str(root), "PYTHONPATH": python_path}

    def local(self, command):
        done = subprocess.run(
            [sys.executable, "-m", "flows.local", command],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pid(self, name):
        return json.loads((self.root / "services" / f"{name}.json").read_text())["pid"]

    def ask(self, path, data=None):
        return self.client.request("GET" if data is None else "POST", path, json=data).json()

    def prefect(self, *command):
        environment = {**self.environment, "PREFECT_API_URL": self.api}
        command = [sys.executable, "-m", "prefect", *command]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    def run(self, deployment="compress/compress", **parameters):
        """`prefect deployment run`; the flow run's id."""
        command = ["deployment", "run", deployment]
        for name, value in parameters.items():
            command += ["--param", f"{name}={json.dumps(value)}"]
        done = self.prefect(*command)
        assert done.returncode == 0, done.stderr
        return re.search(r"UUID: (\S+)", done.stdout)[1]  # the newest of all may be one that a schedule made

    def schedule(self, deployment="compress/compress", **parameters):
        """Put it on a schedule whose first time is in seconds and whose next is in a year; the flow run's id."""
        found = self.ask(f"deployments/name/{deployment}")["id"]
        soon = (datetime.now(UTC) + timedelta(seconds=25)).isoformat()
        yearly = {"interval": 365 * 86400, "anchor_date": soon}
        schedule = {"schedule": yearly, "active": True, "parameters": parameters, "slug": "soon"}
        self.ask(f"deployments/{found}/schedules", [schedule])
        query = {"flow_runs": {"deployment_id": {"any_": [found]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        while True:  # pytest's own time limit bounds it
            for run in self.ask("flow_runs/filter", query):
                if run["auto_scheduled"] and run["parameters"] == parameters:
                    return run["id"]
            time.sleep(0.5)

    def state(self, run):
        return self.ask(f"flow_runs/{run}")["state"]

    def wait(self, run, *types):
        while True:  # pytest's own time limit bounds it
            state = self.state(run)
            if state["type"] in types:
                return state
            assert state["type"] not in ("FAILED", "CRASHED"), self.log(run)
            time.sleep(0.5)

    def log(self, run):
        query = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return "\n".join(line["message"] for line in self.ask("logs/filter", query))

    def tasks(self, run):
        found = [{"state": None}]
        while not all(task["state"] for task in found):  # Prefect writes a task and its states one after the other
            found = self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {task["name"].rsplit("-", 1)[0]: task["state"]["name"] for task in found}

    def artifacts(self, run):
        found = self.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
        return {artifact["key"]: artifact for artifact in found}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    servers = Servers(tmp_path_factory.mktemp("local"))
    try:
        servers.local("up")
        yield servers
    finally:
        servers.local("down")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module")
def first(servers, tiny):
    run = servers.run(model=str(tiny), prune=PRUNE, evaluation=EVALUATION)
    servers.wait(run, "COMPLETED")
    return run


def test_a_deployment_run_leaves_artifacts_and_a_registered_version(servers, first):
    artifacts = servers.artifacts(first)
    assert artifacts["compress-pruning"]["data"] == 100.0
    assert "alias `challenger`" in artifacts["compress-report"]["data"]
    assert "Perplexity, python" in artifacts["compress-figures"]["data"]
    assert artifacts["compress-widths"]["data"].startswith("data:image/svg+xml;base64,")
    assert f"{servers.mlflow}/#/models/tiny-slim/versions/1" in artifacts["compress-version"]["data"]
    version = MlflowClient(servers.mlflow, servers.mlflow).get_model_version_by_alias("tiny-slim", "challenger")
    assert (str(version.version), version.status) == ("1", "READY")
    assert float(version.tags["ratio"]) == pytest.approx(0.25, abs=0.005)


def test_a_schedule_runs_it_and_another_evaluation_prunes_nothing_again_and_says_so(servers, tiny, first):
    run = servers.schedule(model=str(tiny), prune=PRUNE, evaluation=EVALUATION | {"max_blocks": 3})
    servers.wait(run, "COMPLETED")
    assert servers.tasks(run)["prune"] == "Cached"
    assert f"nothing is made again: flow run {first} made the same model" in servers.log(run)


def test_up_twice_changes_nothing_and_a_schedule_that_a_user_switched_on_stays_on(servers):
    deployment = servers.ask("deployments/name/compress/compress")
    (schedule,) = [item for item in deployment["schedules"] if item["slug"] == "weekly"]
    assert not schedule["active"]
    place = f"deployments/{deployment['id']}/schedules/{schedule['id']}"
    servers.client.patch(place, json={"active": True})
    pids = [servers.pid(name) for name in ("prefect", "mlflow", "worker")]
    servers.local("up")
    assert [servers.pid(name) for name in ("prefect", "mlflow", "worker")] == pids
    after = servers.ask("deployments/name/compress/compress")
    assert after["id"] == deployment["id"]
    assert {item["slug"]: item["active"] for item in after["schedules"]}["weekly"]


def test_the_prefect_commands_of_the_docs_are_these_and_work(servers, first):
    run, show = (words[1:] for words in commands("prefect", DOCS))
    assert run[:3] == ["deployment", "run", "compress/compress"]  # as servers.run() did, with other values
    assert [word.partition("=")[0] for word in run[3:]] == ["--param", "model", "--param", "prune"]
    done = servers.prefect(*show)
    assert done.returncode == 0, done.stderr


def test_the_api_refuses_a_value_beyond_its_limit_before_a_run_exists(servers):
    done = servers.prefect("deployment", "run", "compress/compress", "--param", 'prune={"ratio": 2}')
    assert done.returncode != 0
    assert "2 is greater than the maximum of 0.9" in done.stdout + done.stderr


def test_a_worker_killed_while_it_prunes_is_started_again_and_finished_layers_stay(servers, tmp_path):
    dense = write_dense(tmp_path / "deep", num_hidden_layers=24, hidden_size=256, intermediate_size=1024)
    parameters = {"model": str(dense), "prune": {**PRUNE, "num_samples": 64}, "evaluation": EVALUATION}
    run = servers.run(**parameters)
    while not (journals := list(servers.root.glob("deep-slim/*/model/journal.jsonl"))):
        assert servers.state(run)["type"] not in ("FAILED", "CRASHED", "COMPLETED"), servers.log(run)
        time.sleep(0.05)
    (journal,) = journals
    while journal.read_bytes().count(b"\n") < 5:  # the header, the plan and three layers
        time.sleep(0.01)
    os.killpg(servers.pid("worker"), signal.SIGKILL)
    kept = journal.read_bytes().count(b"\n") - 2
    assert not (journal.parent / "config.json").exists()
    servers.local("up")
    assert servers.state(run)["type"] == "CRASHED"  # not "running" for ever
    again = servers.run(**parameters)
    servers.wait(again, "COMPLETED")
    report = load_report(journal.parent)
    assert 3 <= kept <= report.replayed_layers < 24


@pytest.mark.skipif(bool(vllm_obstacle()), reason=f"vLLM cannot run here: {vllm_obstacle()}")
def test_cancelling_a_run_ends_its_vllm_servers(servers, tmp_path):
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    dense = write_dense(tmp_path / "served", **sizes)  # head_dim 32 is the smallest that vLLM's CPU kernels take
    servers.without_vllm.unlink()
    load = {"enforce_eager": True, "kvcache_gib": 1, "dtype": "float32", "offline": False}
    run = servers.run("benchmark/benchmark", dense=str(dense), pruned=str(dense), bench=load)
    while not (leaders := [p.pid for p in psutil.process_iter(["cmdline"]) if str(dense) in (p.info["cmdline"] or [])]):
        assert servers.state(run)["type"] not in ("FAILED", "CRASHED", "COMPLETED"), servers.log(run)
        time.sleep(0.1)
    while len(session_members(leaders[0])) < 2:  # the engine, in a process of its own
        assert servers.state(run)["type"] == "RUNNING", servers.log(run)
        time.sleep(0.1)
    assert servers.prefect("flow-run", "cancel", run).returncode == 0
    servers.wait(run, "CANCELLED")
    while any(session_members(leader) for leader in leaders):  # pytest's own time limit bounds it
        time.sleep(0.1)


def test_down_leaves_no_process(servers):
    leaders = [servers.pid(name) for name in ("prefect", "mlflow", "worker")]
    assert all(psutil.pid_exists(pid) for pid in leaders)
    servers.local("down")
    left = [p.pid for p in psutil.process_iter() if _session(p.pid) in leaders and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []
    assert "nothing was running" in servers.local("down")


def _session(pid):
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return 0


def test_a_port_in_use_is_said_in_one_line_and_nothing_is_started(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment = {**os.environ, "SLIMGPT_RUNS": str(tmp_path), "PREFECT_PORT": port, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "flows.local", "up"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: prefect: port {port} on 127.0.0.1 cannot be used (Address already in use); set PREFECT_PORT to another"
    ]
    assert not list(tmp_path.rglob("*.json"))


def test_one_port_for_two_servers_is_refused_and_nothing_is_started(tmp_path, monkeypatch):
    for variable in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "MLFLOW_PORT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SLIMGPT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PREFECT_PORT", "5000")
    with pytest.raises(ValueError, match="PREFECT_PORT and MLFLOW_PORT are both 5000; set one to another port"):
        Local.here().up()
    assert not (tmp_path / "runs").exists()
