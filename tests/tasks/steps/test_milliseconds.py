"""Stages with a target in speed get the milliseconds that they spend, once everything else is known to work."""

from dataclasses import replace
from pathlib import Path

import pytest
from prefect import flow

from deploy.bench.config import LATENCY_VOCABULARY, BenchConfig
from deploy.bench.latency import table_file
from deploy.engines.availability import vllm_obstacle
from slimgpt.checkpoints.families import layer_shapes
from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.checkpoints.origins import read_config
from slimgpt.config import PruneConfig, QuantizeConfig, RecoverConfig
from slimgpt.files import json_bytes
from slimgpt.method.latency import LatencyTable
from slimgpt.quantization.packages import missing_packages
from tasks.environment import Workspace
from tasks.preflight.chain import plan_chain
from tasks.preflight.models import resolve
from tasks.steps.chain import run_chain
from tasks.steps.milliseconds import timed
from tasks.steps.quantization import QuantizeStage
from tasks.steps.recovery import stages_of
from tests.tiny_models import write_dense

PRUNE = PruneConfig(target_speedup=1.2, num_samples=4, seq_len=64, calibration="python", ffn_multiple=4)
NONE = RecoverConfig(tokens="")
needs_vllm = pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")


@flow(persist_result=False)
def as_fast(
    model: str,
    root: str,
    prune: PruneConfig,
    recover: RecoverConfig,
    rounds: int = 1,
    scheme: str = "",
    group_size: int = 0,
) -> Checkpoint:
    workspace = Workspace(Path(root))
    dense = resolve(model, "", workspace)
    stages = stages_of(prune, recover, rounds=rounds)
    stages += [QuantizeStage(QuantizeConfig(scheme=scheme, group_size=group_size))] if scheme else []
    stages = timed(stages, dense, BenchConfig())
    chain = plan_chain(dense, stages)
    return run_chain(chain, workspace.run("tiny-slim", chain.facts()))


@pytest.fixture
def dense(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / "cache"))
    return write_dense(tmp_path / "tiny", num_hidden_layers=2, head_dim=32, vocab_size=LATENCY_VOCABULARY)


def keep_table(dense: Path, head_ms: float) -> LatencyTable:
    """As if it had been measured here before."""
    shapes = layer_shapes(read_config(dense))
    table = LatencyTable(100.0, shapes[0], len(shapes), head_ms, 1.0, ((0, 0.0), (128, 20.0)), {})
    table_file(dense, BenchConfig()).parent.mkdir(parents=True, exist_ok=True)
    table_file(dense, BenchConfig()).write_bytes(json_bytes(table.to_dict()))
    return table


@needs_vllm
def test_a_pruning_spends_the_kept_table_and_another_table_is_another_model(prefect_server, dense, tmp_path):
    table = keep_table(dense, 1.0)
    made = as_fast(str(dense), str(tmp_path / "runs"), PRUNE, NONE)
    shapes = [layer.shape_of(table.shape) for layer in made.lineage.layers]
    assert made.lineage.last_pruning("requested_speedup") == 1.2
    assert made.lineage.last_pruning("predicted_speedup") == table.speedup(shapes) >= 1.2
    assert as_fast(str(dense), str(tmp_path / "runs"), PRUNE, NONE).folder == made.folder
    keep_table(dense, 3.0)
    assert as_fast(str(dense), str(tmp_path / "runs"), PRUNE, NONE).folder != made.folder


@pytest.mark.parametrize(
    ("prune", "recover", "rounds", "scheme", "message"),
    [
        ({"calibration": "none.txt"}, NONE, 1, "", "none.txt"),
        ({}, RecoverConfig(tokens="8192", seq_len=4096, text="python"), 1, "", "stage 2 of 2: seq_len is 4096"),
        ({}, NONE, 2, "", "rounds is 2 and target_speedup is given; rounds lead to a ratio"),
        ({}, NONE, 1, "w4a16", "stage 2 of 2: llm-compressor is not installed"),
    ],
)
def test_what_is_wrong_elsewhere_is_said_before_anything_is_measured(
    prefect_server, dense, tmp_path, monkeypatch, prune, recover, rounds, scheme, message
):
    """No table is kept: engines would start, which take longer than this test may."""
    monkeypatch.setenv("SLIMGPT_QUANTIZE_PACKAGES", str(tmp_path / "none"))
    with pytest.raises((ValueError, OSError), match=message):
        as_fast(str(dense), str(tmp_path / "runs"), replace(PRUNE, **prune), recover, rounds, scheme)
    assert not (tmp_path / "cache/latency").exists()


@pytest.mark.skipif(bool(missing_packages()), reason=missing_packages() or "llm-compressor is here")
def test_a_group_that_fits_no_widths_is_refused_before_anything_is_measured(prefect_server, dense, tmp_path):
    with pytest.raises(ValueError, match="group_size is 96, which does not divide layer 0's hidden_size of 64"):
        as_fast(str(dense), str(tmp_path / "runs"), PRUNE, NONE, scheme="w4a16", group_size=96)
    assert not (tmp_path / "cache/latency").exists()
