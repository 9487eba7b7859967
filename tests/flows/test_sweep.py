"""Sweeps of a tiny model: on threads, on Dask's own processes, and with vLLM where it can run. All servers are real."""

import json
import os
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client

from deploy.bench.config import BenchConfig
from deploy.engines.availability import vllm_obstacle
from flows.sweep import sweep
from slimgpt.config import EvalConfig, PruneConfig
from tasks.environment import Workspace
from tasks.registry.fetching import fetch_model
from tasks.sweep.config import SweepConfig
from tests.tiny_models import write_dense

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.minutes]
QUICK = EvalConfig(tasks=("none",), perplexity="python", seq_len=64, max_blocks=2)
UNJUDGED = {"min_accuracy_retention": 0, "measure_speed": False}  # a random model answers no question


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def parameters(prefect_server, place):
    # head_dim 32 is the smallest that vLLM's CPU kernels take
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    dense = write_dense(place / "tiny", num_hidden_layers=3, hidden_size=128, intermediate_size=256, **heads)
    return {
        "models": (str(dense),),
        "runs": str(place / "runs"),
        "prune": PruneConfig(num_samples=4, seq_len=64, calibration="python", ffn_multiple=4),
        "evaluation": EvalConfig(tasks=("continuation",), limit=4, perplexity="python", seq_len=64, max_blocks=2),
    }


@pytest.fixture(scope="module")
def done(parameters):
    return sweep(**parameters, grid=SweepConfig(ratios=(0.25, 0.5), workers=2, **UNJUDGED))


@pytest.fixture(scope="module")
def client(done, place):
    return MlflowClient(f"sqlite:///{place}/runs/mlflow.db")


def made(place: Path) -> dict[str, int]:
    """Every pruned model, and when its last layer was written."""
    return {str(path): path.stat().st_mtime_ns for path in (place / "runs" / "tiny-slim").glob("*/model/pruning.json")}


def test_every_model_is_a_child_run_and_the_best_of_them_is_registered(done, client, place):
    titles = [model.title for model in done.outcome.models]
    assert titles == ["tiny", "tiny 25% nats", "tiny 50% nats"]
    assert done.outcome.chosen.title == "tiny 50% nats"  # the smallest
    version = client.get_model_version_by_alias("tiny-slim", "challenger")
    assert version.run_id == done.version.run_id
    best = client.get_run(version.run_id)
    assert best.info.run_name == "tiny 50% nats"
    parent = client.get_run(best.data.tags["mlflow.parentRunId"])
    assert parent.data.params["grid.ratios"] == "[0.25, 0.5]"
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    perplexities = {run.info.run_name: run.data.metrics["pruned/python/perplexity"] for run in children}
    assert perplexities == {model.title: model.perplexity for model in done.outcome.models[1:]}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}
    fetched = fetch_model(done.version.uri, Workspace.at(place / "runs"))
    assert float(version.tags["ratio"]) == pytest.approx(0.5, abs=0.005)
    assert json.loads((fetched / "pruning.json").read_text())["ratio"] == done.outcome.chosen.ratio


def test_table_and_plots_are_in_the_folder_the_run_and_the_ui(done, client):
    facts = json.loads((done.folder / "sweep.json").read_text())
    assert [model["title"] for model in facts["models"]] == [model.title for model in done.outcome.models]
    assert facts["chosen"] == "tiny 50% nats"
    assert facts["front"] == [row[0] for row in done.outcome.rows if "Pareto" in row[-1]]
    parent = client.get_run(done.version.run_id).data.tags["mlflow.parentRunId"]
    assert {file.path for file in client.list_artifacts(parent)} == {"sweep.json", "plots"}
    plots = {Path(file.path).name for file in client.list_artifacts(parent, "plots")}
    assert (
        plots
        == {"perplexity-megabytes.svg", "accuracy-megabytes.svg"}
        == {file.name for file in done.folder.glob("*.svg")}
    )
    with get_client(sync_client=True) as server:
        artifacts = {artifact.key: artifact for artifact in server.read_artifacts()}
    table = json.loads(artifacts["sweep-figures"].data)
    assert [row["model"] for row in table] == [model.title for model in done.outcome.models]
    assert "sweep-perplexity-megabytes" in artifacts


def test_dask_prunes_only_what_is_new_and_leaves_no_variable_of_its_own(done, parameters, place):
    before, environment = made(place), dict(os.environ)
    assert len(before) == 2
    grid = SweepConfig(ratios=(0.25, 0.3, 0.5), runner="dask", **UNJUDGED)
    again = sweep(**{**parameters, "evaluation": QUICK}, grid=grid)
    after = made(place)
    assert before.items() <= after.items()
    assert len(after) == 3
    assert dict(os.environ) == environment
    known = {model.title: model.perplexity for model in again.outcome.models}
    assert {model.title: model.perplexity for model in done.outcome.models}.items() <= known.items()


def test_where_none_keeps_to_the_limits_all_are_recorded_and_none_is_registered(done, parameters, client):
    grid = SweepConfig(ratios=(0.25,), **{**UNJUDGED, "max_size_ratio": 0.5})
    versions = len(client.search_model_versions("name='tiny-slim'"))
    with pytest.raises(
        ValueError, match=r"none is registered: tiny 25% nats: max_size_ratio: 0\.\d+, .* above the limit"
    ):
        sweep(**{**parameters, "evaluation": QUICK}, grid=grid)
    newest = client.search_runs([client.get_run(done.version.run_id).info.experiment_id], "", max_results=20)
    assert {"sweep", "tiny 25% nats"} <= {run.info.run_name for run in newest[:4]}
    assert {run.info.status for run in newest} == {"FINISHED"}
    assert len(client.search_model_versions("name='tiny-slim'")) == versions


def test_one_that_fails_is_named_and_the_others_stay(done, parameters, place):
    """The folder of one pruning holds something else: the user's mistake, so an error without a traceback."""
    runs = place / "fails"
    own = {**parameters, "runs": str(runs), "evaluation": QUICK}
    sweep(**own, grid=SweepConfig(ratios=(0.25,), **UNJUDGED))
    (kept,) = (runs / "tiny-slim").glob("*/model")
    shutil.rmtree(kept)
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match="1 of 3 failed; run it again, and finished models are reused: tiny 25% nats.*holds notes.txt"
    ):
        sweep(**own, grid=SweepConfig(ratios=(0.25, 0.5), **UNJUDGED))
    assert len(list((runs / "tiny-slim").glob("*/evaluation-pruned.json"))) == 2


def test_a_dry_run_names_each_point_and_makes_nothing(parameters, tmp_path):
    grid = SweepConfig(ratios=(0.25, 0.5), **UNJUDGED)
    said = sweep(**{**parameters, "runs": str(tmp_path), "evaluation": QUICK}, grid=grid, dry_run=True)
    assert [stage.name for stage in said.stages] == ["tiny 25% nats prune", "tiny 50% nats prune"]
    assert said.stages[0].bytes_after > said.stages[1].bytes_after
    assert said.disk_bytes >= sum(stage.bytes_after for stage in said.stages)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": SweepConfig(ratios=(0.25, 0.9), **UNJUDGED), "models": ("nowhere",)}, "no folder nowhere"),
        ({"grid": SweepConfig(ratios=(0.25,), schedules=("log",), **UNJUDGED), "name": "a/b"}, "registered model's"),
        ({"models": ()}, "models is empty; name at least one"),
        ({"grid": SweepConfig(prefer="speed", **UNJUDGED)}, "prefer is 'speed', and throughput .* measure_speed"),
    ],
)
def test_bad_requests_end_before_long_work(parameters, tmp_path, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        sweep(**{**parameters, "runs": str(tmp_path), **change})
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]


@pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")
def test_speed_is_measured_and_can_be_preferred(done, parameters):
    bench = BenchConfig(
        num_prompts=4, input_len=16, output_len=32, pairs=1, load_shares=(), offline=False, num_warmups=1,
        enforce_eager=True, show_drift=False, kvcache_gib=1, dtype="float32",
    )  # fmt: skip
    grid = SweepConfig(ratios=(0.25,), prefer="speed", min_accuracy_retention=0)
    found = sweep(**{**parameters, "evaluation": QUICK}, bench=bench, grid=grid, name="fast")
    dense, pruned = found.outcome.models
    assert found.outcome.chosen == pruned
    assert pruned.speedup == pytest.approx(pruned.throughput / dense.throughput)
    assert found.version.name == "fast"
