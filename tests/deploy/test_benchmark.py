"""One real benchmark of two tiny models, and the refusals that come before one."""

import json
import re
from pathlib import Path

import psutil
import pytest
import torch

from deploy.availability import vllm_available
from deploy.bench_report import METRICS, BenchReport
from deploy.benchmark import BenchConfig, compare
from tests.deploy.slim_checkpoint import write_dense, write_slim

pytestmark = pytest.mark.skipif(bool(vllm_available()), reason=vllm_available() or "vLLM runs here")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_dense(folder / "dense", dtype=torch.bfloat16), write_slim(folder / "slim", dtype=torch.bfloat16)


def test_real_benchmark(models: tuple[Path, Path], tmp_path: Path):
    config = BenchConfig(
        num_prompts=6, input_len=32, output_len=8, pairs=2, num_warmups=2, enforce_eager=True, kvcache_gib=1
    )
    told: list[str] = []
    report = compare(*models, config, workdir=tmp_path / "bench", on_progress=told.append)

    assert BenchReport.from_dict(json.loads((tmp_path / "bench/bench.json").read_text())) == report
    assert len(report.dense) == len(report.pruned) == 2
    for run in report.dense + report.pruned:
        assert run["completed"] == 6 and run["failed"] == 0 and run["total_output_tokens"] == 6 * 8
        assert run["mean_ttft_ms"] <= run["mean_e2el_ms"] and run["p50_e2el_ms"] <= run["p99_e2el_ms"]
    assert set(report.ratios) == set(METRICS)
    for name, ratio in report.ratios.items():
        pairs = [p[name] / d[name] for d, p in zip(report.dense, report.pruned, strict=True)]
        assert (ratio.low, ratio.high) == (min(pairs), max(pairs)) and ratio.low <= ratio.median <= ratio.high
    # Pairs send the same prompts to both models, and each pair sends other ones than the last.
    order = [re.match(r"(\S+), (dense|pruned): ", line) for line in told]
    assert [f"{m[1]} {m[2]}" for m in order if m] == [
        "pair1of2 dense",
        "pair1of2 pruned",
        "pair2of2 dense",
        "pair2of2 pruned",
        "again dense",
    ]
    # Fewer kv heads and smaller files are measured, not timed: these must hold.
    assert report.kv_cache_tokens["pruned"] > report.kv_cache_tokens["dense"] > 0
    assert report.file_bytes["pruned"] < report.file_bytes["dense"]
    assert report.drift is not None and report.drift > 0
    assert report.metrics["ratio/output_throughput"] == report.ratios["output_throughput"].median
    assert str(tmp_path) not in json.dumps(report.to_dict())  # no path of this machine
    # Nothing of either server is left.
    for side in ("dense", "pruned"):
        pids = {int(pid) for pid in re.findall(r"pid=(\d+)", (tmp_path / f"bench/vllm-{side}.log").read_text())}
        assert len(pids) >= 2
        assert [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"] == []


def test_requests_too_long_for_the_model_are_refused_before_a_start(models: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"input_len 500 \+ output_len 64 = 564 tokens; .* allows 512"):
        compare(*models, BenchConfig(input_len=500, output_len=64), workdir=tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize(
    ("field", "value"), [("num_prompts", 0), ("output_len", 1), ("pairs", 0), ("request_rate", -1.0)]
)
def test_settings_outside_their_limits_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        BenchConfig(**{field: value})
