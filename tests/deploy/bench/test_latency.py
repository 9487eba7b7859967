"""Milliseconds of a model's units, measured in real engines once, and the refusals that come before."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deploy.bench import latency
from deploy.bench.config import LATENCY_VOCABULARY, BenchConfig
from deploy.bench.latency import known_latency, measure_latency, read_latency
from deploy.bench.vllm_bench import batch_latency_ms
from deploy.engines.availability import vllm_obstacle
from flows.cli.app import app
from slimgpt.checkpoints.families import layer_shapes
from slimgpt.checkpoints.origins import read_config
from slimgpt.report import load_report
from tests.deploy.slim_checkpoint import write_slim
from tests.tiny_models import write_dense

needs_vllm = pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")
REQUESTS = "--num-prompts 4 --input-len 16 --output-len 4 --latency-iterations 2 --enforce-eager --kvcache-gib 1"
CONFIG = BenchConfig(num_prompts=4, input_len=16, output_len=4, latency_iterations=2, enforce_eager=True, kvcache_gib=1)
PRUNE = "--num-samples 4 --seq-len 64 --calibration python --ffn-multiple 4"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / "cache"))


def slimgpt(*words: object) -> None:
    app([str(word) for word in words], result_action="return_value", exit_on_error=False)


def milliseconds(width: int) -> float:
    """Of a batch, as an undisturbed machine might take them."""
    return 200.0 + width / 16


@needs_vllm
@pytest.mark.vllm
@pytest.mark.minutes
def test_it_is_measured_once_and_a_pruning_spends_it(tmp_path, monkeypatch, capsys):
    """The narrowest FFN runs in a real engine, without weights; what the clock says there is no test's business."""
    dense = write_dense(tmp_path / "dense", dtype=torch.bfloat16, head_dim=32, vocab_size=LATENCY_VOCABULARY)
    measured = []

    def take(folder: Path, config: BenchConfig, *, seed: int, result: Path) -> float:
        shape = layer_shapes(read_config(folder))[0]
        measured.append((shape.num_heads, shape.num_kv_heads, shape.intermediate_size))
        if shape.intermediate_size == 32:
            assert not list(folder.glob("*.safetensors"))
            assert batch_latency_ms(folder, config, seed=seed, result=result) > 0
            assert len(json.loads(result.read_text())["latencies"]) == config.latency_iterations
        return milliseconds(shape.intermediate_size) * (1 + 0.01 * len(measured))  # the machine becomes slower

    monkeypatch.setattr(latency, "batch_latency_ms", take)
    slimgpt("latency", dense, "--out", tmp_path / "table.json", *REQUESTS.split())
    assert measured == [(8, 4, 128), (8, 4, 96), (8, 4, 64), (8, 4, 32), (4, 4, 128), (4, 2, 128), (8, 4, 128)]
    said = capsys.readouterr()
    assert "4 of 7: 8 heads, 4 kv heads, FFN 32 in every layer: 210 ms" in said.err
    table = read_latency(tmp_path / "table.json")
    assert table == known_latency(dense, CONFIG)
    assert known_latency(dense, replace(CONFIG, output_len=5)) is None
    assert table.total_ms == pytest.approx(milliseconds(128) * 1.01)
    narrow = [replace(table.shape, intermediate_size=32)] * table.layers
    assert table.speedup(narrow) == pytest.approx(milliseconds(128) / milliseconds(32), rel=1e-4)
    assert table.measured["load"]["input_len"] == 16

    slimgpt("latency", dense, *REQUESTS.split())
    assert len(measured) == 7  # from the cache
    assert f"{table.total_ms:,.0f} ms" in capsys.readouterr().out
    asked = ["--target-speedup", "1.02", "--latency", tmp_path / "table.json", *PRUNE.split()]
    slimgpt("prune", dense, tmp_path / "out", *asked)
    report = load_report(tmp_path / "out")
    assert report.requested == {"speedup": 1.02}
    assert report.predicted_speedup >= 1.02
    assert (
        f"x {report.predicted_speedup:.2f} by the table of milliseconds (x 1.02 requested)" in capsys.readouterr().out
    )


def test_after_an_interruption_only_the_widths_that_are_left_are_measured(tmp_path, monkeypatch):
    """On a machine that is twice as fast then: the table is that of an undisturbed measurement on that machine."""
    dense = write_dense(tmp_path / "dense", head_dim=32, vocab_size=LATENCY_VOCABULARY)
    widths, speed = [], 1.0

    def take(folder: Path, *_: object, **__: object) -> float:
        if speed == 1 and len(widths) == 3:
            raise KeyboardInterrupt
        widths.append(layer_shapes(read_config(folder))[0].intermediate_size)
        return milliseconds(widths[-1]) / speed

    monkeypatch.setattr(latency, "batch_latency_ms", take)
    monkeypatch.setattr(latency, "vllm_obstacle", lambda: "")
    monkeypatch.setattr(latency, "model_obstacle", lambda _: "")
    with pytest.raises(KeyboardInterrupt):
        measure_latency(dense, CONFIG)
    assert widths == [128, 96, 64] and known_latency(dense, CONFIG) is None
    speed = 2.0
    table = measure_latency(dense, CONFIG)
    assert widths[3:] == [128, 32, 128, 128, 128]  # 96 and 64 are not among them
    assert table.total_ms == pytest.approx(milliseconds(128) / 2)
    saved = {width: (milliseconds(128) - milliseconds(width)) / 2 / table.layers for width in (96, 64, 32)}
    ffn = dict(table.ffn_ms)
    assert {width: ffn[128] - ffn[width] for width in saved} == pytest.approx(saved)
    assert table.measured["before_an_interruption"] == 2
    assert not list((tmp_path / "cache" / "latency").glob("*.part"))


def test_after_a_measurement_that_makes_no_table_all_is_measured_again(tmp_path, monkeypatch):
    dense = write_dense(tmp_path / "dense", head_dim=32, vocab_size=LATENCY_VOCABULARY)
    monkeypatch.setattr(latency, "batch_latency_ms", lambda *_, **__: 200.0)
    monkeypatch.setattr(latency, "vllm_obstacle", lambda: "")
    monkeypatch.setattr(latency, "model_obstacle", lambda _: "")
    with pytest.raises(ValueError, match="is not faster here"):
        measure_latency(dense, CONFIG)
    assert not list((tmp_path / "cache" / "latency").glob("*.part"))


@pytest.mark.parametrize("text", ["", "[]", '{"0": "fast"}', '{"99": 0.5}'])
def test_a_damaged_memory_of_an_interruption_is_not_used(tmp_path, text):
    (tmp_path / "table.part").write_text(text)
    assert latency._read_part(tmp_path / "table.part", 5) == {}


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
