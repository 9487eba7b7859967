"""Milliseconds of a model's units, measured in real engines once, and the refusals that come before."""

import json
from dataclasses import replace

import pytest
import torch

from deploy.bench import latency
from deploy.bench.config import LATENCY_VOCABULARY, BenchConfig
from deploy.bench.latency import known_latency, measure_latency, read_latency
from deploy.engines.availability import vllm_obstacle
from flows.cli.app import app
from slimgpt.method.latency import probe_shapes
from slimgpt.report import load_report
from tests.deploy.slim_checkpoint import write_slim
from tests.tiny_models import write_dense

needs_vllm = pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")
REQUESTS = "--num-prompts 16 --input-len 100 --output-len 4 --latency-iterations 4 --enforce-eager --kvcache-gib 1"
CONFIG = BenchConfig(
    num_prompts=16, input_len=100, output_len=4, latency_iterations=4, enforce_eager=True, kvcache_gib=1
)
PRUNE = "--num-samples 4 --seq-len 64 --calibration python --dtype bfloat16"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / "cache"))


def slimgpt(*words: object) -> None:
    app([str(word) for word in words], result_action="return_value", exit_on_error=False)


@needs_vllm
@pytest.mark.vllm
@pytest.mark.minutes
def test_it_is_measured_once_and_a_pruning_spends_it(tmp_path, monkeypatch, capsys):
    """Of the widths that are measured, an FFN of a quarter alone: each takes an engine's start."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 256, "head_dim": 32, "intermediate_size": 8192}
    dense = write_dense(tmp_path / "dense", dtype=torch.bfloat16, vocab_size=LATENCY_VOCABULARY, **sizes)
    monkeypatch.setattr(latency, "probe_shapes", lambda shape, heads: probe_shapes(shape, heads=heads)[2:3])
    slimgpt("latency", dense, "--out", tmp_path / "table.json", *REQUESTS.split())
    said = capsys.readouterr()
    assert "2 of 3: 8 heads, 4 kv heads, FFN 2048 in every layer" in said.err
    assert "3 of 3: 8 heads, 4 kv heads, FFN 8192 in every layer" in said.err
    table = read_latency(tmp_path / "table.json")
    assert table == known_latency(dense, CONFIG)
    assert known_latency(dense, replace(CONFIG, output_len=5)) is None
    layers_ms = table.layers_us([table.shape] * 4) / 1000
    assert 0 < layers_ms < table.total_ms
    assert (
        table.speedup([replace(table.shape, intermediate_size=2048)] * 4) > 1.2
    )  # 96 % of the operations are the FFN's
    assert table.measured["load"]["input_len"] == 100

    def again(*_, **__):
        raise AssertionError("it was measured again")

    monkeypatch.setattr(latency, "batch_latency_ms", again)
    slimgpt("latency", dense, *REQUESTS.split())
    assert f"{table.total_ms:,.0f} ms" in capsys.readouterr().out
    asked = ["--target-speedup", "1.1", "--latency", tmp_path / "table.json", *PRUNE.split()]
    slimgpt("prune", dense, tmp_path / "out", *asked)
    report = load_report(tmp_path / "out")
    assert report.requested == {"speedup": 1.1}
    assert report.predicted_speedup >= 1.1
    assert (
        f"x {report.predicted_speedup:.2f} by the table of milliseconds (x 1.10 requested)" in capsys.readouterr().out
    )


def test_what_cannot_be_measured_is_refused_before_an_engine_starts(tmp_path, monkeypatch):
    slim = write_slim(tmp_path / "slim")
    monkeypatch.setattr(latency, "vllm_obstacle", lambda: "")  # the same where there is none
    with pytest.raises(
        ValueError, match="has layers of different widths; milliseconds are measured where all are equal"
    ):
        measure_latency(slim, CONFIG)
    dense = write_dense(tmp_path / "dense", head_dim=32)
    with pytest.raises(ValueError, match=r"input_len 600 \+ output_len 4 = 604 tokens; .* allows 512"):
        measure_latency(dense, replace(CONFIG, input_len=600))
    with pytest.raises(ValueError, match="has a vocabulary of 512; .* tokens: set a ratio instead of a speed"):
        measure_latency(dense, CONFIG)
    monkeypatch.setattr(latency, "vllm_obstacle", lambda: "vLLM is not installed")
    with pytest.raises(ValueError, match="speed cannot be measured here: vLLM is not installed"):
        measure_latency(slim, CONFIG)


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"total_ms": 1})])
def test_a_file_that_is_no_table_is_refused(tmp_path, text):
    with pytest.raises(FileNotFoundError, match="`slimgpt latency MODEL --out"):
        read_latency(tmp_path / "table.json")
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"table.json is no table of `slimgpt latency` .*; remove it and measure again"
    ):
        read_latency(tmp_path / "table.json")
