"""Pruning and then quantising, in a small flow: planned before any work, made once."""

from pathlib import Path

import pytest
from prefect import flow

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.config import PruneConfig, QuantizeConfig
from slimgpt.quantization.packages import missing_packages
from tasks.environment import Workspace
from tasks.preflight.chain import Chain, plan_chain
from tasks.preflight.models import resolve
from tasks.steps.chain import run_chain
from tasks.steps.pruning import PruneStage
from tasks.steps.quantization import QuantizeStage
from tests.tiny_models import write_dense

PRUNE = PruneConfig(ratio=0.3, num_samples=4, seq_len=64, calibration="python", ffn_multiple=32)
QUANTIZE = QuantizeConfig(num_samples=4, seq_len=64, calibration="python", device="cpu")


@flow(persist_result=False)
def smaller(model: str, root: str, prune: PruneConfig, quantize: QuantizeConfig) -> tuple[Chain, Checkpoint]:
    workspace = Workspace(Path(root))
    chain = plan_chain(resolve(model, "", workspace), [PruneStage(prune), QuantizeStage(quantize)])
    return chain, run_chain(chain, workspace.run("tiny-slim", chain.facts()))


@pytest.fixture
def dense(tmp_path):
    return write_dense(
        tmp_path / "tiny", num_hidden_layers=2, head_dim=32, num_attention_heads=4, num_key_value_heads=2
    )


@pytest.mark.skipif(bool(missing_packages()), reason=missing_packages()[:200] or "they are here")
def test_the_pruned_model_is_quantised_as_planned_and_the_same_request_is_made_once(prefect_server, dense, tmp_path):
    chain, made = smaller(str(dense), str(tmp_path / "runs"), PRUNE, QUANTIZE)
    assert made.lineage.names == "prune, quantize"
    assert made.lineage.steps[-1].config["group_size"] == 32
    planned = chain.stages[-1].bytes_after
    assert planned == pytest.approx(made.lineage.after("bytes"), abs=16384)  # headers
    assert made.lineage.after("bytes") < 0.6 * made.lineage.steps[0].figures["bytes_after"]
    when = (made.folder / "lineage.json").stat().st_mtime_ns
    _, again = smaller(str(dense), str(tmp_path / "runs"), PRUNE, QUANTIZE)
    assert (again.folder, (again.folder / "lineage.json").stat().st_mtime_ns) == (made.folder, when)


def test_what_does_not_fit_the_planned_widths_is_said_before_the_pruning(prefect_server, dense, tmp_path, monkeypatch):
    narrow, wide = PruneConfig(**{**PRUNE.to_dict(), "ffn_multiple": 8}), QuantizeConfig(group_size=64)
    with pytest.raises(ValueError, match=r"stage 2 of 2: group_size is 64, which does not divide layer \d's FFN width"):
        smaller(str(dense), str(tmp_path / "runs"), narrow, wide)
    monkeypatch.setenv("SLIMGPT_QUANTIZE_PACKAGES", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="stage 2 of 2: llm-compressor is not installed"):
        smaller(str(dense), str(tmp_path / "runs"), PRUNE, QUANTIZE)
    assert not list(tmp_path.glob("runs/**/*.safetensors"))
