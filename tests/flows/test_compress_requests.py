"""What a request says before the work: what cannot be, what would be made, what is left out. On a tiny random model."""

import dataclasses

import pytest
from mlflow import MlflowClient

from deploy.bench.config import BenchConfig
from deploy.bundle.folder import verify_bundle
from flows.compress import compress
from flows.defaults import RECOVER
from slimgpt.config import EvalConfig, PruneConfig
from tasks.environment import Workspace
from tasks.registry.gates import GateConfig
from tasks.registry.promotion import PromotionRefusedError, promote
from tests.flows.small_compress import small_parameters
from tests.tiny_models import write_dense

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.minutes]
HASTY = EvalConfig(tasks=("none",), perplexity="python", seq_len=64, max_blocks=2)


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    return small_parameters(tmp_path_factory.mktemp("compress"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "registered model's name"),
        ({"prune": PruneConfig(calibration="missing.jsonl", seq_len=64, ffn_multiple=16)}, "does not exist"),
        ({"prune": PruneConfig(calibration="python", num_samples=100_000, seq_len=64, ffn_multiple=16)}, "at most"),
        ({"evaluation": EvalConfig(tasks=("no_such_task",))}, "no_such_task"),
        ({"model": "nowhere"}, "no folder nowhere"),
        ({"evaluation": EvalConfig(tasks=("none",), perplexity="python", seq_len=4096)}, "evaluation: .*lower seq_len"),
        ({"bench": BenchConfig(input_len=4096)}, "bench: input_len 4096 .* lower one of them"),
    ],
)
def test_bad_requests_end_before_long_work(prefect_server, parameters, tmp_path, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        compress(**{**parameters, "runs": str(tmp_path), **change})
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".html")]


def test_a_model_that_vllm_does_not_take_is_said_before_the_work_and_registered(prefect_server, parameters, tmp_path):
    dense = write_dense(tmp_path / "narrow", num_hidden_layers=2, head_dim=16)
    narrow = {**parameters, "model": str(dense), "runs": str(tmp_path / "runs"), "evaluation": HASTY}
    done = compress(**{**narrow, "prune": dataclasses.replace(parameters["prune"], ffn_multiple=4)})
    assert "takes heads of 32, 64" in done.report.markdown.read_text()
    assert done.version.version == "1"


def test_a_dry_run_checks_all_makes_nothing_and_expects_what_the_run_then_makes(prefect_server, parameters, tmp_path):
    training = dataclasses.replace(RECOVER, tokens="1024", seq_len=32, text="python", held_out=2)
    given = {**parameters, "recover": training, "runs": str(tmp_path / "runs"), "skip": ("evaluate", "benchmark")}
    said = compress(**given, dry_run=True)
    assert [stage.name for stage in said.stages] == ["prune", "recover"]
    assert all(stage.seconds > 0 and stage.memory_bytes > 1e8 for stage in said.stages)
    assert not list(tmp_path.rglob("*.safetensors"))
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert client.search_registered_models() == []
    done = compress(**given)
    assert said.folders == (str(done.folder),)
    made = sum(file.stat().st_size for file in (done.folder / "model").glob("*.safetensors"))
    assert [stage.bytes_after for stage in said.stages] == pytest.approx([made, made], rel=0.02)
    assert said.disk_bytes > made
    assert compress(**given, dry_run=True).disk_bytes == 0
    with pytest.raises(ValueError, match="bench: input_len 4096 .* lower one of them"):
        compress(**{**given, "skip": (), "bench": BenchConfig(input_len=4096)}, dry_run=True)


def test_stages_are_left_out_on_request(prefect_server, parameters, tmp_path):
    """And nothing is checked for them: no text, no length, no engine."""
    unusable = {"evaluation": EvalConfig(perplexity="nowhere.txt", seq_len=4096), "bench": BenchConfig(input_len=4096)}
    given = {**parameters, **unusable, "name": "quick-slim", "runs": str(tmp_path / "runs")}
    done = compress(**given, skip=("evaluate", "benchmark"))
    assert not list(done.folder.glob("evaluation-*.json")) and not (done.folder / "bench").exists()
    text = done.report.markdown.read_text()
    assert "Skipped: evaluation: left out on request" in text and "Skipped: benchmark: left out on request" in text
    assert "Perplexity" not in text and "Projection parameters removed" in text
    assert "Perplexity" not in (done.folder / "bundle" / "README.md").read_text()
    version = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").get_model_version_by_alias(
        "quick-slim", "challenger"
    )
    assert (version.tags["evaluation"], version.tags["benchmark"]) == ("skipped", "skipped")
    with pytest.raises(PromotionRefusedError, match="no perplexity was measured; .* no throughput was measured"):
        promote("quick-slim", 1, "champion", GateConfig(), Workspace.at(tmp_path / "runs"))
    assert verify_bundle(done.folder / "bundle") == []
