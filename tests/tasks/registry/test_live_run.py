"""A run that is open while the work goes on: what it shows when, how it ends, what is done when MLflow goes away."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from slimgpt.checkpoints.lineage import Lineage, prune_step
from slimgpt.report import load_report
from tasks.environment import RunFolder, Workspace
from tasks.registry import run_owner
from tasks.registry.client import impatient, open_client
from tasks.registry.config import RegistryConfig
from tasks.registry.live_run import open_run
from tasks.registry.run_content import layer_metrics
from tasks.registry.runs import record_run
from tests.tasks.registry import finished_run

QUIET = RegistryConfig(machine_seconds=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run.make(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def report(run):
    return load_report(RunFolder(run).model)


def opened(workspace, name="tiny-slim", config=QUIET, folder="0123"):
    parameters = {"prune": {"ratio": 0.25}}
    return open_run(name, parameters, config, workspace, RunFolder(workspace.root / name / folder))


def newest(workspace, count=1):
    client = open_client(workspace)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, max_results=count)


def steps(client, run_id, name="layer/ffn_error"):
    return [metric.step for metric in client.get_metric_history(run_id, name)]


def test_it_is_there_with_its_parameters_at_once_and_figures_come_as_they_are_logged(workspace, report):
    with opened(workspace) as live:
        client = open_client(workspace)
        seen = client.get_run(live.run_id)
        assert (seen.info.status, seen.data.params) == ("RUNNING", {"prune.ratio": "0.25"})
        assert seen.data.tags["mlflow.source.name"] == "flows.compress"
        for layer in report.layers[:-1]:
            live.log_layer(layer)
            assert steps(client, live.run_id) == list(range(layer.layer + 1))
        lineage = Lineage((prune_step(report),))
        live.log_pruning(lineage, lineage)  # knows the last layer, too
        live.log_pruning(lineage, lineage)
        assert steps(client, live.run_id) == list(range(len(report.layers)))
        assert client.get_run(live.run_id).data.metrics["pruning/ratio"] == report.ratio
    assert client.get_run(live.run_id).info.status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("layer 3 gives NaN; see /home/someone/runs/log\nand more"), "FAILED", "ValueError: layer 3 gives"),
        (ConnectionError("https://me:planted0@host/x failed"), "FAILED", "ConnectionError: https://host/x failed"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
        (SystemExit(3), "KILLED", "SystemExit: 3"),
    ],
)
def test_what_stops_the_work_is_its_status_and_a_tag(workspace, error, status, reason):
    with contextlib.suppress(type(error)), opened(workspace) as live:
        child = live.child("a part", {}, "flows.sweep")
        done = live.child("another", {}, "flows.sweep")
        done.finish()
        raise error
    client = open_client(workspace)
    for run_id in (live.run_id, child.run_id):
        seen = client.get_run(run_id)
        assert seen.info.status == status
        assert seen.data.tags["failure"].startswith(reason)
        assert not any(word in seen.data.tags["failure"] for word in ("someone", "planted0", "more"))
    assert client.get_run(done.run_id).info.status == "FINISHED"


def test_a_part_is_scheduled_until_its_work_begins_and_fails_alone(workspace):
    with opened(workspace) as live:
        client = open_client(workspace)
        first, second = (live.child(title, {"prune": {"ratio": 0.5}}, "flows.sweep") for title in ("first", "second"))
        assert client.get_run(first.run_id).info.status == "SCHEDULED"
        with contextlib.suppress(ValueError), first.working():
            assert client.get_run(first.run_id).info.status == "RUNNING"
            raise ValueError("too wide")
        assert client.get_run(first.run_id).info.status == "FAILED"
        assert client.get_run(second.run_id).data.params == {"prune.ratio": "0.5"}
    statuses = [client.get_run(part.run_id).info.status for part in (live, first, second)]
    assert statuses == ["FINISHED", "FAILED", "FINISHED"]


OPEN_AND_WAIT = """
import sys
from pathlib import Path
from tests.tasks.registry.test_live_run import opened
from tasks.environment import Workspace
with opened(Workspace.at(sys.argv[1])) as live:
    live.child("a part", {}, "flows.sweep")
    print(live.run_id, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process(workspace):
    """A process that has a run open; its id. The process is killed after the test at the latest."""
    command = [sys.executable, "-c", OPEN_AND_WAIT, str(workspace.root)]
    search = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(command, env=search, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_the_next_run_of_the_name_marks_a_killed_one_and_follows_it(workspace, other_process):
    process, run_id = other_process
    client = open_client(workspace)
    with opened(workspace):
        assert client.get_run(run_id).info.status == "RUNNING"  # it lives
    process.send_signal(signal.SIGSTOP)
    with opened(workspace):
        assert client.get_run(run_id).info.status == "RUNNING"  # so does one that stands still
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)  # nobody has waited for it yet
    with opened(workspace, name="another-slim"):
        assert client.get_run(run_id).info.status == "RUNNING"  # of another name
    with opened(workspace, folder="4567") as elsewhere, opened(workspace) as live:
        killed = client.get_run(run_id)
        assert killed.info.status == "KILLED"
        assert "its process ended" in killed.data.tags["failure"]
        parts = client.search_runs([killed.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
        assert [part.info.status for part in parts] == ["KILLED"]
        assert "follows" not in client.get_run(elsewhere.run_id).data.tags
        # the newest run of the folder was finished, so this one goes on with none
        assert "follows" not in client.get_run(live.run_id).data.tags
    with pytest.raises(KeyboardInterrupt), opened(workspace) as stopped:
        raise KeyboardInterrupt
    with opened(workspace) as live:
        assert client.get_run(live.run_id).data.tags["follows"] == stopped.run_id


def test_runs_of_other_machines_and_of_nobody_are_left_alone(workspace):
    client = open_client(workspace)
    with opened(workspace) as live:
        place = client.get_run(live.run_id).info.experiment_id
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    machine, pid, started = run_owner.this_process().split(" ")
    tags = {
        "of another machine": f"0123456789abcdef {gone.stdout.strip()} {started}",
        "of a process that ended": f"{machine} {gone.stdout.strip()} {started}",
        "of one with the pid of this one": f"{machine} {pid} 1",
        "of one that names no process": "",
    }
    runs = {
        what: client.create_run(place, run_name="tiny-slim", tags={"process": tag} if tag else {}).info.run_id
        for what, tag in tags.items()
    }
    with opened(workspace):
        statuses = {what: client.get_run(run_id).info.status for what, run_id in runs.items()}
    assert statuses == {
        "of another machine": "RUNNING",
        "of a process that ended": "KILLED",
        "of one with the pid of this one": "KILLED",
        "of one that names no process": "RUNNING",
    }


def test_a_worker_of_another_machine_does_not_write_to_an_sqlite_file(workspace, report):
    with opened(workspace) as live:
        there = dataclasses.replace(live, machine="0123456789abcdef", sampling_interval=0.05)
        with contextlib.suppress(RuntimeError), there.working():
            assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
            there.log_layer(report.layers[0])
            raise RuntimeError
        seen = open_client(workspace).get_run(live.run_id)
        assert (seen.info.status, seen.data.metrics) == ("RUNNING", {})
        live.log_layer(report.layers[0])
        assert steps(open_client(workspace), live.run_id) == [0]


def test_no_host_name_is_recorded():
    assert run_owner.platform.node() not in run_owner.this_process()


def test_samples_of_the_machine_are_in_the_run_and_go_on_where_they_stopped(workspace):
    def samples():
        return client.get_metric_history(part.run_id, "system/system_memory_usage_megabytes")

    def wait_for(count):
        while len(samples()) < count:  # pytest's own time limit bounds it
            time.sleep(0.05)

    client = open_client(workspace)
    with opened(workspace, config=RegistryConfig(machine_seconds=0.05)) as live:
        part = live.child("a part", {}, "flows.sweep")
        with part.working():
            wait_for(2)
        threads = {thread.name for thread in threading.enumerate()}
        counted = len(samples())
        with part.working():
            wait_for(counted + 2)
    assert [sample.step for sample in samples()] == list(range(len(samples())))
    total = psutil.virtual_memory().total / 1e6
    assert all(0 < sample.value < total for sample in samples())
    assert "system/cpu_utilization_percentage" in client.get_run(live.run_id).data.metrics
    assert "SystemMetricsMonitor" in threads  # of the run around it
    assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}


def test_no_samples_where_the_interval_is_0(workspace):
    with opened(workspace) as live:
        assert "SystemMetricsMonitor" not in {thread.name for thread in threading.enumerate()}
    assert not [name for name in open_client(workspace).get_run(live.run_id).data.metrics if "system/" in name]


def test_mlflow_goes_away_and_comes_back_and_every_layer_is_there_once(run, report, own_server, tmp_path, caplog):
    workspace = Workspace.at(tmp_path / "runs")
    request = finished_run.request(run, "tiny-slim", config=RegistryConfig(machine_seconds=0.1))
    with open_run("tiny-slim", request.parameters, request.config, workspace, request.folder) as live:
        live.log_layer(report.layers[0])
        own_server.stop()
        for layer in report.layers[1:]:
            live.log_layer(layer)
        live.log_evaluation("dense", request.dense)
        own_server.start()
        record_run(live, request)
        record_run(live, request)  # as after a fault on the way
    client = open_client(workspace)
    seen = client.get_run(live.run_id)
    assert seen.info.status == "FINISHED"
    for metric in layer_metrics(report.layers[0]):
        assert steps(client, live.run_id, metric.key) == list(range(len(report.layers)))
    assert f"dense/{next(iter(request.dense.metrics))}" in seen.data.metrics
    warnings = [record for record in caplog.records if record.name == "tasks.registry.live_run"]
    assert len(warnings) == 1
    assert "MLflow failed" in warnings[0].message


def test_blocks_of_several_threads_leave_the_patience_as_it_was(monkeypatch):
    variable = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.setenv(variable, "5")
    inside, leave = threading.Event(), threading.Event()

    def other():
        with impatient():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with impatient():
        thread.start()
        inside.wait()
    assert os.environ[variable] == "0"
    leave.set()
    thread.join()
    assert os.environ[variable] == "5"
