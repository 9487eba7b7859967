"""A benchmark that is added to a registered version: what promotions then read, and what is refused."""

import dataclasses

import pytest

from tasks.registry.client import open_client
from tasks.registry.gates import GateConfig
from tasks.registry.later_benchmark import find_version, record_benchmark
from tasks.registry.promotion import PromotionRefusedError, promote
from tests.deploy.bench_report import bench_report
from tests.tasks.registry import finished_run
from tests.tiny_models import write_dense

SPEED = GateConfig(
    max_perplexity_ratio=0, min_accuracy_retention=0, champion_max_perplexity_ratio=0, champion_min_accuracy_retention=0
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run.make(tmp_path_factory.mktemp("finished"))


def registered(run, workspace, **failed):
    """A version without a speed."""
    request = finished_run.request(run, "tiny-slim")
    comparison = dataclasses.replace(request.report.comparison, **failed)
    request = dataclasses.replace(request, report=dataclasses.replace(request.report, comparison=comparison))
    return finished_run.registered(request, workspace)


def measured(run, workspace, version, tmp_path, **environment):
    """A benchmark of that version, recorded."""
    report = bench_report()
    report = dataclasses.replace(report, environment={**report.environment, **environment})
    (tmp_path / "bench.json").write_text("{}")
    place = (run.parent / "tiny", run / "model")
    record_benchmark(find_version(f"models:/tiny-slim/{version}", *place, workspace), report, tmp_path, workspace)
    return report


def test_promotions_read_what_was_recorded(run, workspace, tmp_path):
    client = open_client(workspace)
    version = registered(run, workspace, bench_failure="the server died")
    assert client.get_model_version("tiny-slim", "1").tags["benchmark"] == "failed"
    with pytest.raises(PromotionRefusedError, match="no throughput was measured"):
        promote("tiny-slim", 1, "champion", SPEED, workspace)
    report = measured(run, workspace, 1, tmp_path)
    tags = client.get_model_version("tiny-slim", "1").tags
    assert (tags["benchmark"], tags["bench_machine"]) == ("measured", "a <fast> CPU, 2 cores")
    assert "benchmark_failure" not in tags and tags["bench.input_len"] == "128"
    assert promote("tiny-slim", 1, "champion", SPEED, workspace).version == "1"
    experiment = client.get_run(version.run_id).info.experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{version.run_id}'")
    speeds = {child.data.tags["side"]: child.data.metrics["bench/output_throughput"] for child in children}
    assert speeds == {side: report.full.median(side, "output_throughput") for side in ("dense", "pruned")}


def test_speeds_of_two_machines_do_not_compare_wherever_the_models_were_pruned(run, workspace, tmp_path):
    for version, device in (("1", "a"), ("2", "a"), ("3", "b")):
        assert registered(run, workspace).version == version  # all pruned on one device
        measured(run, workspace, version, tmp_path, device=device)
    promote("tiny-slim", 1, "champion", SPEED, workspace)
    with pytest.raises(PromotionRefusedError, match=r"another bench_machine \(a, 2 cores, here b, 2 cores\)"):
        promote("tiny-slim", 3, "champion", SPEED, workspace)
    open_client(workspace).set_model_version_tag("tiny-slim", "2", "device", "another one, which pruned it")
    assert promote("tiny-slim", 2, "champion", SPEED, workspace).version == "2"


def test_another_dense_model_is_refused(run, workspace, tmp_path):
    registered(run, workspace)
    other = write_dense(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"other is not the model that tiny-slim version 1 was compared with \(tiny\)"):
        find_version("models:/tiny-slim/1", other, run / "model", workspace)


def test_a_run_that_takes_no_figures_is_said_before_anything_is_measured(run, workspace):
    client, version = open_client(workspace), registered(run, workspace)
    place = ("models:/tiny-slim/1", run.parent / "tiny", run / "model", workspace)
    experiment = client.get_run(version.run_id).info.experiment_id
    client.delete_experiment(experiment)
    with pytest.raises(ValueError, match="experiment 'slimgpt' was deleted"):
        find_version(*place)
    client.restore_experiment(experiment)
    client.delete_run(version.run_id)
    with pytest.raises(ValueError, match=rf"deleted and takes no figures: restore it .*--run-id {version.run_id}"):
        find_version(*place)
    client.restore_run(version.run_id)
    assert int(find_version(*place).version) == 1
    client.delete_run(version.run_id)
    client._tracking_client.store._hard_delete_run(version.run_id)  # as `mlflow gc` does
    with pytest.raises(FileNotFoundError, match=r"not found; nothing can be recorded of it"):
        find_version(*place)


@pytest.mark.parametrize("uri", ["models:/tiny-slim", "models:/m-1", "runs:/1", "folder", "org/model"])
def test_a_model_that_is_no_version_is_refused(run, workspace, uri):
    with pytest.raises(ValueError, match=f"the benchmark of {uri} cannot be recorded: name a version, such as"):
        find_version(uri, run.parent / "tiny", run / "model", workspace)


def test_a_version_that_is_not_there_is_refused(run, workspace):
    registered(run, workspace)
    for uri in ("models:/tiny-slim/7", "models:/tiny-slim@nobody"):
        with pytest.raises(FileNotFoundError, match=uri):
            find_version(uri, run.parent / "tiny", run / "model", workspace)
