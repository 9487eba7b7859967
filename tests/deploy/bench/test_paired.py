"""One real benchmark of two tiny models, and the refusals that come before one."""

import contextlib
import dataclasses
import io
import json
import queue
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from pydantic import TypeAdapter
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deploy.bench import paired
from deploy.bench.client import bench_client
from deploy.bench.config import LATENCY_VOCABULARY, BenchConfig
from deploy.bench.paired import compare
from deploy.bench.results import COUNTS, LATENCY_METRICS, METRICS, THROUGHPUT_METRICS, BenchReport, Paired, Ratio
from deploy.bench.vllm_bench import bench_latency, bench_serve, bench_throughput, server_config
from deploy.engines.availability import vllm_obstacle
from deploy.report.plots import bench_plots
from deploy.serving.server import ServerError, serving
from flows.cli.app import app
from slimgpt.files import locked
from tests.deploy.slim_checkpoint import write_dense, write_slim
from tests.flows.cli.test_serve import register
from tests.tiny_models import write_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.minutes]
needs_vllm = pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")
DOCUMENT = Path(__file__).parents[3] / "docs" / "bench.md"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_dense(folder / "dense", dtype=torch.bfloat16), write_slim(folder / "slim", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def done(models: tuple[Path, Path], tmp_path_factory) -> tuple[BenchReport, Path, list[str]]:
    """What ``slimgpt bench --record`` measured, where, and what it said meanwhile."""
    workdir = tmp_path_factory.mktemp("bench") / "bench"
    runs = workdir.parent / "runs"
    register(models[1], runs)
    flags = (
        "--num-prompts 6 --input-len 32 --output-len 32 --pairs 2 --num-warmups 2 --enforce-eager --kvcache-gib 1 "
        "--load-shares 0.5 --no-offline"
    )
    made: list[BenchReport] = []

    def kept(*arguments, **options) -> BenchReport:
        made.append(compare(*arguments, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as progress:
        patch.setattr(paired, "compare", kept)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        places = ["--workdir", str(workdir), "--runs", str(runs)]
        command = ["bench", str(models[0]), "models:/tiny@champion", "--record", *places, *flags.split()]
        app(command, result_action="return_value")
    return made[0], workdir, progress.getvalue().splitlines()


def check(runs: Paired, metrics: tuple[str, ...]) -> None:
    assert set(runs.ratios) == set(metrics)
    for name, ratio in runs.ratios.items():
        pairs = [p[name] / d[name] for d, p in zip(runs.dense, runs.pruned, strict=True)]
        assert (ratio.low, ratio.high) == (min(pairs), max(pairs)) and ratio.low <= ratio.median <= ratio.high


@needs_vllm
def test_every_load_is_measured_in_turn(done):
    report, _, progress = done
    assert [load.name for load in report.loads] == ["full", "50pct"]
    assert report.loads[1].request_rate == 0.5 * report.full.dense[0]["request_throughput"]
    for load in report.loads:
        check(load.runs, METRICS)
        assert len(load.runs.dense) == len(load.runs.pruned) == 2
        for run in load.runs.dense + load.runs.pruned:
            assert run["completed"] == 6 and run["failed"] == 0 and run["total_output_tokens"] == 6 * 32
            assert run["mean_ttft_ms"] <= run["mean_e2el_ms"] and run["p50_e2el_ms"] <= run["p99_e2el_ms"]
    # Pairs send the same prompts to both models, and each pair sends other ones than the last.
    # Each pair starts both servers anew, so that ratios hold what one start differs by from the next.
    order = [line.partition(": ")[0] for line in progress if "tokens/s" in line or line.startswith("starting")]
    sides = ("dense", "pruned")
    expected = []
    for pair in (1, 2):
        expected += [f"starting vLLM with the {side} model" for side in sides]
        expected += [f"{load}-pair{pair}of2-{side}" for load in ("full", "50pct") for side in sides]
    assert order == [*expected, "serving-again-dense"]
    assert list(report.drift) == ["serving"] and report.drift["serving"] > 0


@needs_vllm
def test_footprints_and_savings_are_of_these_models(done, models):
    report, _, _ = done
    dense, pruned = report.footprints["dense"], report.footprints["pruned"]
    # Fewer kv heads and smaller files are measured, not timed: these must hold.
    assert pruned.kv_cache_tokens > dense.kv_cache_tokens > 0
    assert pruned.file_bytes < dense.file_bytes == sum(f.stat().st_size for f in models[0].glob("*.safetensors"))
    assert None not in (dense.load_seconds, pruned.load_seconds)  # in hundredths: 0.00 for models as small as these
    assert 5e8 < pruned.peak_memory_bytes < 2e10  # Python, torch and vLLM in two processes at least
    saved = report.savings["serving"]
    durations = zip(report.full.dense, report.full.pruned, strict=True)
    expected = Ratio.of([1 - p["duration"] / d["duration"] for d, p in durations])
    assert asdict(saved.time) == pytest.approx(asdict(expected))
    assert saved.efficiency.median == pytest.approx(saved.time.median / max(saved.operations, saved.bytes))


@needs_vllm
def test_bench_json_is_what_the_document_says(done):
    report, workdir, _ = done
    text = (workdir / "bench.json").read_text()
    assert BenchReport.from_dict(json.loads(text)) == report
    TypeAdapter(BenchReport).validate_json(text, strict=True)  # every type, not only every name
    assert str(workdir.parent) not in text  # no path of this machine
    assert [file.read_text()[:5] for file in workdir.glob("*.svg")] == ["<svg "] * len(bench_plots(report)) != []
    document = DOCUMENT.read_text()
    named = set(re.findall(r"`(\w+)`", document))
    footprint, config = set(json.loads(text)["footprints"]["dense"]), set(json.loads(text)["config"])
    assert set(json.loads(text)) | footprint | set(COUNTS) | set(THROUGHPUT_METRICS) | set(LATENCY_METRICS) <= named
    assert {"num_warmups", "num_prompts", "pairs", "load_shares", "request_rates", "kvcache_gib"} <= named & (
        config | named
    )
    assert f"version of this layout: {report.schema} " in document


@needs_vllm
def test_nothing_of_either_server_is_left(done):
    _, workdir, _ = done
    started = set()
    for log in ("dense", "pruned", "dense-2", "pruned-2"):
        pids = {int(pid) for pid in re.findall(r"pid=(\d+)", (workdir / f"vllm-{log}.log").read_text())}
        assert len(pids) >= 2
        assert not pids & started  # a process of an earlier start
        started |= pids
        assert [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"] == []


@needs_vllm
def test_record_adds_the_figures_to_the_version_and_its_run(done):
    report, workdir, _ = done
    client = MlflowClient(f"sqlite:///{workdir.parent}/runs/mlflow.db")
    version = client.get_model_version("tiny", "1")
    assert version.tags["speedup"] == f"{report.ratios['output_throughput'].median:.4f}"
    assert (version.tags["bench_machine"], version.tags["benchmark"]) == (report.machine, "measured")
    assert version.tags["bench.input_len"] == "32"
    metrics = client.get_run(version.run_id).data.metrics
    assert metrics["bench/ratio/output_throughput"] == report.metrics["ratio/output_throughput"]
    assert "bench.json" in {file.path for file in client.list_artifacts(version.run_id)}


@needs_vllm
def test_mlflow_gets_medians_under_names_that_it_takes(done):
    metrics = done[0].metrics
    assert metrics["ratio/output_throughput"] == done[0].ratios["output_throughput"].median
    assert metrics["load_50pct/dense/p95_e2el_ms"] == done[0].loads[1].runs.median("dense", "p95_e2el_ms")
    assert metrics["efficiency/serving"] == done[0].savings["serving"].efficiency.median
    assert all(re.fullmatch(r"[\w./-]+", name) and isinstance(value, int | float) for name, value in metrics.items())


@needs_vllm
def test_offline_runs_do_the_requested_work(models, tmp_path):
    config = BenchConfig(
        num_prompts=5,
        input_len=16,
        output_len=4,
        num_warmups=1,
        enforce_eager=True,
        kvcache_gib=1,
        latency_iterations=3,
    )
    run = bench_throughput(models[1], config, seed=1, result=tmp_path / "throughput.json")
    assert run["total_output_tokens"] == 5 * 4 and run["total_input_tokens"] >= 5 * 16
    assert run["output_throughput"] == pytest.approx(5 * 4 / run["duration"])
    assert run["total_token_throughput"] > run["output_throughput"] > run["request_throughput"] > 0
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    large = LlamaForCausalLM(LlamaConfig(vocab_size=LATENCY_VOCABULARY, **sizes)).to(torch.bfloat16)
    large.save_pretrained(tmp_path / "large")
    write_tokenizer(tmp_path / "large")
    run = bench_latency(tmp_path / "large", config, seed=1, result=tmp_path / "latency.json")
    assert len(json.loads((tmp_path / "latency.json").read_text())["latencies"]) == 3
    assert run["mean_latency_ms"] > 0 and run["p50_latency_ms"] > 0


@pytest.fixture(scope="module")
def small(models, tmp_path_factory):
    """A client, a server that takes 40 tokens, and the config of four answer tokens each."""
    place = tmp_path_factory.mktemp("small")
    config = BenchConfig(num_prompts=2, input_len=60, output_len=4, num_warmups=1, enforce_eager=True, kvcache_gib=1)
    narrow = dataclasses.replace(server_config(models[0], config), max_model_len=40)
    with (
        serving(models[0], narrow, log=place / "vllm.log", served_name="dense") as server,
        bench_client(place / "client.log") as client,
    ):
        yield client, server, config


@needs_vllm
def test_requests_that_fail_end_the_benchmark(models, small, tmp_path):
    """The server takes 40 tokens, the requests have 64: vLLM's command exits 0 with nothing but failures."""
    client, server, config = small
    failed = r"0 of 2 requests to the dense model completed, 2 failed|vllm bench serve ended"
    with pytest.raises(ServerError, match=failed):
        bench_serve(client, server, models[0], config, request_rate=0, seed=0, result=tmp_path / "run.json")


@needs_vllm
@pytest.mark.parametrize("name", ["custom", "sharegpt"])
def test_prompts_of_a_file_are_sent(models, small, tmp_path, name):
    client, server, config = small
    prompts = ["Why is the sky blue?", "What does the if statement do, and where?"]
    if name == "custom":
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    else:
        path = tmp_path / "shared.json"
        path.write_text(json.dumps([{"conversations": [{"value": text}, {"value": "So."}]} for text in prompts]))
    config = dataclasses.replace(config, dataset_name=name, dataset_path=str(path))
    run = bench_serve(client, server, models[0], config, request_rate=0, seed=0, result=tmp_path / "run.json")
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    assert run["total_input_tokens"] == sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    assert run["total_output_tokens"] == 2 * 4


@needs_vllm
def test_requests_too_long_for_the_model_are_refused_before_a_start(models: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"input_len 500 \+ output_len 64 = 564 tokens; .* allows 512"):
        compare(*models, BenchConfig(input_len=500, output_len=64, offline=False), workdir=tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


@needs_vllm
def test_vocabularies_too_small_for_vllms_latency_command_are_refused(models, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary of \d+; .* first 10,000 tokens: set offline to false"):
        compare(*models, BenchConfig(), workdir=tmp_path / "bench")
    assert not (tmp_path / "bench").exists()


def test_two_benchmarks_in_one_folder_follow_each_other(models, tmp_path, monkeypatch):
    """Both name their files alike; `slimgpt bench` writes to runs/bench by default."""
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(paired, "check_servable", lambda _: None)
    monkeypatch.setattr(paired._Measuring, "served", lambda self: self.tell("measured"))
    run = partial(compare, *models, BenchConfig(offline=False), workdir=tmp_path, on_progress=told.put)
    with ThreadPoolExecutor(1) as other, contextlib.suppress(TypeError):  # nothing was measured
        with locked(tmp_path):
            done = other.submit(run)
            assert told.get(timeout=60) == f"another benchmark writes to {tmp_path}: waiting for its end"
            assert told.empty()
        assert told.get(timeout=60) == "measured"
        done.result()


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_prompts", 0), ("output_len", 1), ("pairs", 0), ("request_rates", (-1.0,)), ("load_shares", [0.5, 0])],
)
def test_settings_outside_their_limits_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        BenchConfig(**{field: value})


def test_a_file_of_another_schema_is_refused_in_one_line():
    with pytest.raises(ValueError, match="has schema None; this version reads 2: measure again"):
        BenchReport.from_dict({"dense": []})
