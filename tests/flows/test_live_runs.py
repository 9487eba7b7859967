"""MLflow's run of a flow while it goes on and when it is cut short: seen by another thread, on a real SQLite store."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from mlflow import MlflowClient
from prefect.exceptions import TerminationSignal

from flows.compress import compress
from flows.sweep import sweep
from slimgpt.config import EvalConfig, PruneConfig
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

    def logged(self, layer):
        log_layer(self, layer)
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


@pytest.mark.parametrize(
    ("stop", "error", "status"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), TerminationSignal, "KILLED"),  # as Prefect cancels a run
        (lambda: os.kill(os.getpid(), signal.SIGINT), KeyboardInterrupt, "KILLED"),
        (None, OSError, "FAILED"),
    ],
)
def test_one_that_is_cut_short_says_so_and_the_next_goes_on_with_every_layer(
    parameters, client, monkeypatch, stop, error, status
):
    given, model = parameters

    def log_layer(self, layer):
        if layer.layer == 1 and stop is None:
            raise OSError("no more")
        if layer.layer == 1:
            stop()

    with monkeypatch.context() as patch:
        patch.setattr(LiveRun, "log_layer", log_layer)
        with pytest.raises(error):
            compress(model, **given)
    [cut] = all_runs(client)
    assert cut.info.status == status
    assert error.__name__ in cut.data.tags["failure"]
    assert client.search_model_versions() == []
    done = compress(model, **given)
    run = client.get_run(done.version.run_id)
    assert run.data.tags["follows"] == cut.info.run_id
    assert steps(client, run.info.run_id) == list(range(LAYERS))
    assert done.report.comparison.pruning.replayed_layers > 0


def test_what_is_refused_early_opens_no_run(parameters, client):
    given, model = parameters
    with pytest.raises(ValueError, match="ask for at most"):
        compress(model, **{**given, "prune": PruneConfig(num_samples=100_000, calibration="python", ffn_multiple=4)})
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
        assert set(statuses) == {"sweep", "tiny 25% log", "tiny 50% log"}
        assert statuses["sweep"] == statuses[title] == "RUNNING"
        assert title == f"tiny {float(ratio):.0%} log"
        assert logged == list(range(layer + 1))
    assert "SCHEDULED" in seen["tiny 25% log", 0][0].values()  # one at a time
    runs = {one.info.run_name: one for one in all_runs(client)}
    assert {one.info.status for one in runs.values()} == {"FINISHED"}
    for name in ("sweep", "tiny 25% log", "tiny 50% log"):
        assert "system/cpu_utilization_percentage" in runs[name].data.metrics
    assert client.get_run(done.version.run_id).info.run_name == "tiny 50% log"
