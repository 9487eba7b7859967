"""MLflow's run of a flow while it goes on and when it is cut short: seen by another thread, on a real SQLite store."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL

from flows.compress import compress
from flows.sweep import sweep
from slimgpt.config import EvalConfig, PruneConfig
from slimgpt.report import load_report
from tasks.registry.config import RegistryConfig
from tasks.registry.live_run import LiveRun
from tasks.sweep.config import SweepConfig
from tests.tiny_models import write_dense

pytestmark = pytest.mark.slow
LAYERS = 3


@pytest.fixture
def parameters(prefect_server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # a benchmark has nothing to do with what is tried here
    dense = write_dense(tmp_path / "tiny", num_hidden_layers=LAYERS)
    return {
        "runs": str(tmp_path / "runs"),
        "prune": PruneConfig(num_samples=4, seq_len=64, calibration="python", ffn_multiple=4),
        "evaluation": EvalConfig(tasks=("none",), perplexity="python", seq_len=64, max_blocks=2),
        "registry": RegistryConfig(machine_seconds=0.05),
    }, str(dense)


@pytest.fixture
def client(tmp_path):
    (tmp_path / "runs").mkdir()
    return MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")


def all_runs(client):
    return client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])


def steps(client, run_id):
    return [metric.step for metric in client.get_metric_history(run_id, "layer/ffn_error")]


def after_each_layer(monkeypatch, call):
    """Call ``call(run, layer)`` in another thread whenever a layer of a flow is logged."""
    log_layer = LiveRun.log_layer
    with_own_client = ThreadPoolExecutor(1)

    def logged(self, layer, prefix=""):
        log_layer(self, layer, prefix)
        with_own_client.submit(call, self, layer).result()

    monkeypatch.setattr(LiveRun, "log_layer", logged)


def test_while_it_prunes_the_run_is_open_with_parameters_and_the_layers_so_far(parameters, client, monkeypatch):
    given, model = parameters
    seen = []

    def look(run, _):
        now = client.get_run(run.run_id)
        seen.append((now.info.status, now.data.params["prune.ratio"], steps(client, run.run_id)))

    after_each_layer(monkeypatch, look)
    done = compress(model, **given)
    assert seen == [("RUNNING", "0.25", list(range(layer + 1))) for layer in range(LAYERS)]
    assert steps(client, done.version.run_id) == list(range(LAYERS))
    run = client.get_run(done.version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    # pruned and evaluated already: the figures are all there, once
    again = compress(model, **given)
    assert again.version.version == "2"
    for name in ("layer/ffn_error", "pruning/ratio", "dense/python/perplexity", "pruned/python/perplexity"):
        histories = [client.get_metric_history(one.version.run_id, name) for one in (done, again)]
        first, second = ([(metric.step, metric.value) for metric in history] for history in histories)
        assert first == second
    assert "follows" not in client.get_run(again.version.run_id).data.tags


def test_of_two_prunings_the_last_ones_layers_count_from_the_dense_model_and_the_first_ones_have_a_prefix(
    parameters, client
):
    given, model = parameters
    done = compress(model, first_ratios=(0.15,), **given)
    lineage = done.report.comparison.lineage
    assert lineage.names == "prune, prune"
    for name, layers in (("stage_1/layer", lineage.steps[0].layers), ("layer", lineage.layers)):
        for figure in ("ratio", "ffn_error", "intermediate_size"):
            history = client.get_metric_history(done.version.run_id, f"{name}/{figure}")
            values = [pytest.approx(getattr(layer, figure)) for layer in layers]
            assert [(metric.step, metric.value) for metric in history] == list(enumerate(values))
    assert client.get_run(done.version.run_id).data.metrics["pruning/ratio"] == pytest.approx(lineage.ratio)


# The flow in a process of its own, which stands still when it comes to its second layer.
STANDS_STILL = """
import sys, time
from flows.cli.app import main
from tasks.registry.live_run import LiveRun
sys.modules["vllm"] = None
log_layer = LiveRun.log_layer
def stand_still(self, layer, prefix):
    if layer.layer == 1:
        print("stands still", flush=True)
        time.sleep(600)
    log_layer(self, layer, prefix)
LiveRun.log_layer = stand_still
main()
"""
SMALL = (
    "--num-samples 4 --seq-len 64 --ffn-multiple 4 --calibration python --evaluation.tasks none --evaluation.seq-len 64"
)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, "KILLED"), (signal.SIGINT, "KILLED"), (signal.SIGKILL, "RUNNING")]
)
def test_one_that_is_killed_is_known_and_the_next_goes_on_with_every_layer(parameters, client, number, status):
    """SIGTERM is how Prefect's worker cancels a run; after SIGKILL the next run says what became of it."""
    given, model = parameters
    words = ["compress", "--model", model, "--runs", given["runs"], *SMALL.split()]
    own = {
        **os.environ,
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MLFLOW_TRACKING_URI": client.tracking_uri,
    }
    command = [sys.executable, "-c", STANDS_STILL, *words]
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if "stands still" in line:
                break
        else:
            pytest.fail("".join(said[-30:]))
        [cut] = all_runs(client)
        assert cut.info.status == "RUNNING"
        process.send_signal(number)
        process.communicate()
    assert process.returncode != 0
    cut = client.get_run(cut.info.run_id)
    assert cut.info.status == status
    assert steps(client, cut.info.run_id) == [0]
    done = compress(model, **given)
    run = client.get_run(done.version.run_id)
    cut = client.get_run(cut.info.run_id)
    assert (cut.info.status, run.data.tags["follows"]) == ("KILLED", cut.info.run_id)
    assert cut.data.tags["failure"]
    assert steps(client, run.info.run_id) == list(range(LAYERS))
    assert load_report(done.folder / "model").replayed_layers > 0


def test_one_that_fails_says_why_and_has_no_version(parameters, client, monkeypatch):
    given, model = parameters

    def full(_, layer, prefix):
        raise OSError(f"no room for layer {layer.layer} in /some/folder/of/mine")

    monkeypatch.setattr(LiveRun, "log_layer", full)
    with pytest.raises(OSError, match="no room"):
        compress(model, **given)
    [failed] = all_runs(client)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure"] == "OSError: no room for layer 0 in mine"
    assert client.search_model_versions() == []


def test_what_is_refused_early_opens_no_run(parameters, client):
    given, model = parameters
    many = PruneConfig(num_samples=100_000, seq_len=64, calibration="python", ffn_multiple=4)
    with pytest.raises(ValueError, match="ask for at most"):
        compress(model, **{**given, "prune": many})
    grid = SweepConfig(ratios=(0.25,), min_accuracy_retention=0.5, measure_speed=False)
    with pytest.raises(ValueError, match="min_accuracy_retention"):
        sweep((model,), **given, grid=grid)
    assert all_runs(client) == []


def test_a_sweeps_models_have_runs_from_its_beginning_and_each_its_figures(parameters, client, monkeypatch):
    given, model = parameters
    seen = {}

    def look(run, layer):
        runs = {one.info.run_name: one for one in all_runs(client)}
        now = client.get_run(run.run_id)
        statuses = {name: one.info.status for name, one in runs.items()}
        seen[now.info.run_name, layer.layer] = statuses, now.data.params["prune.ratio"], steps(client, run.run_id)

    after_each_layer(monkeypatch, look)
    grid = SweepConfig(ratios=(0.25, 0.5), min_accuracy_retention=0, max_perplexity_ratio=0, measure_speed=False)
    done = sweep((model,), **given, grid=grid)
    assert len(seen) == 2 * LAYERS
    for (title, layer), (statuses, ratio, logged) in seen.items():
        assert set(statuses) == {"sweep", "tiny 25% nats", "tiny 50% nats"}
        assert statuses["sweep"] == statuses[title] == "RUNNING"
        assert title == f"tiny {float(ratio):.0%} nats"
        assert logged == list(range(layer + 1))
    assert "SCHEDULED" in seen["tiny 25% nats", 0][0].values()  # one at a time
    runs = {one.info.run_name: one for one in all_runs(client)}
    assert {one.info.status for one in runs.values()} == {"FINISHED"}
    for name in ("sweep", "tiny 25% nats", "tiny 50% nats"):
        assert "system/cpu_utilization_percentage" in runs[name].data.metrics
    assert client.get_run(done.version.run_id).info.run_name == "tiny 50% nats"
