"""Dense against pruned, measured by vLLM's own benchmark so that the gain can be believed.

Both servers stay up and only one is under load: dense, pruned, dense, pruned, ... and dense once more, which shows how
much the machine itself drifted. The two runs of a pair send the same prompts; every pair sends new ones. Answers have a
fixed length, the prefix cache is off, warm-ups are dropped, and one failed request fails the benchmark.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.availability import serves_on_cpu, vllm_version
from deploy.bench_report import COUNTS, METRICS, BenchReport, Ratio
from deploy.serving import (
    RunningServer,
    ServeConfig,
    ServerError,
    check_servable,
    child_environment,
    log_tail,
    serving,
    stop_session,
)
from slimgpt.config import check_limits, option
from slimgpt.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What load both models are measured under.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    num_prompts: int = option(32, "Requests per run.", ge=1)
    input_len: int = option(128, "Prompt tokens per request.", ge=1)
    output_len: int = option(64, "Answer tokens per request, exactly.", ge=2)
    pairs: int = option(3, "Dense-pruned pairs; ratios are their median, low and high.", ge=1)
    request_rate: float = option(0.0, "Requests per second, Poisson arrivals; 0 sends all at once.", ge=0)
    max_concurrency: int = option(0, "Requests under way at most; 0: no limit.", ge=0)
    num_warmups: int = option(16, "Requests, sent at once before each run, that are not counted.", ge=1)
    seed: int = option(0, "Prompts of the first pair; each further pair adds 1.", ge=0)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("bfloat16", "Dtype of both servers.")
    enforce_eager: bool = option(False, "Skip torch.compile: the servers start sooner and answer slower.")
    kvcache_gib: int = option(2, "On CPU: memory for each server's KV cache, GiB.", ge=1)
    trust_remote_code: bool = option(False, "Run the code in the checkpoints: needed only without the slimgpt plugin.")
    show_drift: bool = option(True, "Measure dense once more at the end.")
    start_timeout_s: float = option(900.0, "Longest wait for a server to answer, seconds.", gt=0)
    run_timeout_s: float = option(1800.0, "Longest run, seconds.", gt=0)

    def __post_init__(self) -> None:
        check_limits(self)


def compare(
    dense: Path,
    pruned: Path,
    config: BenchConfig,
    *,
    workdir: Path,
    on_progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Serve both models, measure them in turn, and write ``workdir``/bench.json (servers' and clients' logs beside it).

    Raises:
        ValueError: before anything starts: vLLM cannot run here, a folder is no checkpoint, requests too long.
        ServerError: a server did not start, a request failed, or the two models did not do the same work.
    """
    started = time.monotonic()
    models = {"dense": dense, "pruned": pruned}
    for model in models.values():
        check_servable(model)
        _check_length(model, config)
    workdir.mkdir(parents=True, exist_ok=True)
    tell = on_progress or (lambda _: None)
    runs: dict[str, list[dict[str, float]]] = {"dense": [], "pruned": []}
    servers: dict[str, RunningServer] = {}
    with ExitStack() as stack:
        for side, model in models.items():
            tell(f"starting vLLM with the {side} model")
            log = workdir / f"vllm-{side}.log"
            server = serving(model, _server(model, config), log=log, served_name=side, timeout_s=config.start_timeout_s)
            servers[side] = stack.enter_context(server)
            tell(f"{side} model answers after {servers[side].start_seconds:.0f} s")

        def measure(side: str, seed: int, name: str) -> dict[str, float]:
            run = _bench(servers[side], dense, config, seed=seed, result=workdir / f"run-{name}-{side}.json")
            tell(f"{name}, {side}: {run['output_throughput']:.0f} tokens/s, TTFT {run['mean_ttft_ms']:.0f} ms")
            return run

        for pair in range(config.pairs):
            seed = config.seed + pair
            for side in models:
                runs[side].append(measure(side, seed, f"pair{pair + 1}of{config.pairs}"))
            if runs["dense"][-1]["total_input_tokens"] != runs["pruned"][-1]["total_input_tokens"]:
                raise ServerError(
                    f"the models read different prompts in pair {pair + 1}: are their tokenizers the same?"
                )
        drift = None
        if config.show_drift:
            again = measure("dense", config.seed + config.pairs, "again")
            drift = again["output_throughput"] / runs["dense"][0]["output_throughput"]
    report = BenchReport(
        config=asdict(config),
        environment=_environment(),
        dense=runs["dense"],
        pruned=runs["pruned"],
        ratios={name: _ratio(name, runs["dense"], runs["pruned"]) for name in METRICS},
        drift=drift,
        start_seconds={side: server.start_seconds for side, server in servers.items()},
        load_seconds={
            side: _from_log(server.log, r"Loading weights took ([\d.]+) s") for side, server in servers.items()
        },
        file_bytes={side: sum(f.stat().st_size for f in model.glob("*.safetensors")) for side, model in models.items()},
        kv_cache_tokens={
            side: int(_from_log(server.log, r"KV cache size: ([\d,]+) tokens")) for side, server in servers.items()
        },
        seconds=time.monotonic() - started,
    )
    write_atomically(workdir / "bench.json", json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _server(model: Path, config: BenchConfig) -> ServeConfig:
    # Retokenised prompts can come out a little longer than asked for; a server has room for twice the request.
    room = 2 * (config.input_len + config.output_len)
    return ServeConfig(
        dtype=config.dtype,
        max_model_len=min(room, _longest(model) or room),
        enforce_eager=config.enforce_eager,
        kvcache_gib=config.kvcache_gib,
        gpu_memory_utilization=0.0 if serves_on_cpu() else 0.45,  # two servers share the GPU
        trust_remote_code=config.trust_remote_code,
        # A model's own generation_config could set a temperature; cached prefixes would be measured, not computed.
        extra=("--generation-config", "vllm", "--no-enable-prefix-caching"),
    )


def _longest(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text()).get("max_position_embeddings", 0))


def _check_length(model: Path, config: BenchConfig) -> None:
    longest, asked = _longest(model), config.input_len + config.output_len
    if longest and asked > longest:
        raise ValueError(
            f"input_len {config.input_len} + output_len {config.output_len} = {asked} tokens; {model} allows "
            f"{longest}: lower one of them"
        )


def _bench(server: RunningServer, tokenizer: Path, config: BenchConfig, *, seed: int, result: Path) -> dict[str, float]:
    """One ``vllm bench serve`` against a running server; its checked figures."""
    command = [sys.executable, "-P", "-m", "deploy.vllm_entry", "bench", "serve"]
    command += ["--base-url", server.url, "--model", server.model_name, "--tokenizer", str(tokenizer.resolve())]
    command += ["--dataset-name", "random", "--random-range-ratio", "0", "--seed", str(seed)]
    command += ["--random-input-len", str(config.input_len), "--random-output-len", str(config.output_len)]
    command += ["--num-prompts", str(config.num_prompts), "--num-warmups", str(config.num_warmups)]
    command += ["--request-rate", str(config.request_rate or "inf"), "--ignore-eos", "--temperature", "0"]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,95,99", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
    if config.max_concurrency:
        command += ["--max-concurrency", str(config.max_concurrency)]
    if config.trust_remote_code:
        command.append("--trust-remote-code")
    log = result.with_suffix(".log")
    result.unlink(missing_ok=True)  # an older run's figures must not be taken for this one's
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            start_new_session=True,
        )
    try:
        code = process.wait(config.run_timeout_s)
    except subprocess.TimeoutExpired:
        raise ServerError(f"vllm bench did not end within {config.run_timeout_s:.0f} s; {log_tail(log)}") from None
    finally:
        stop_session(process)
    if code != 0 or not result.is_file():
        raise ServerError(f"vllm bench ended with code {code}; {log_tail(log)}")
    figures = json.loads(result.read_text())
    # The command exits 0 with failed requests, and their absence would pass for speed.
    if figures["failed"] or figures["completed"] != config.num_prompts:
        raise ServerError(
            f"{figures['completed']} of {config.num_prompts} requests to the {server.model_name} model completed, "
            f"{figures['failed']} failed; {log_tail(server.log)}"
        )
    if figures["total_output_tokens"] != config.num_prompts * config.output_len:
        raise ServerError(
            f"the {server.model_name} model wrote {figures['total_output_tokens']} tokens; "
            f"{config.num_prompts} x {config.output_len} were asked for"
        )
    return {name: figures[name] for name in (*METRICS, *COUNTS)}  # paths and dates stay behind


def _ratio(name: str, dense: list[dict[str, float]], pruned: list[dict[str, float]]) -> Ratio:
    ratios = [p[name] / d[name] for d, p in zip(dense, pruned, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def _from_log(log: Path, pattern: str) -> float:
    found = re.findall(pattern, log.read_text(errors="replace"))
    return float(found[-1].replace(",", "")) if found else float(0)


def _environment() -> dict[str, Any]:
    import torch
    import transformers

    device = platform.machine()
    if not serves_on_cpu():
        device = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        device = next(iter(re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())), device)
    return {
        "vllm": vllm_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
    }
