"""One run of ``vllm bench serve``, ``throughput`` or ``latency``: its checked figures, or an error.

vLLM's command exits 0 where requests failed or answers were short, and the work that was not done would pass for speed.
"""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from deploy.bench.client import BenchClient
from deploy.bench.config import BenchConfig, longest_of
from deploy.bench.dataset import SHAREGPT_TOTAL, serve_arguments
from deploy.bench.results import COUNTS, METRICS
from deploy.engines.availability import serves_on_cpu
from deploy.serving.server import (
    RunningServer,
    ServeConfig,
    ServerError,
    child_environment,
    log_tail,
    start_session,
    stop_session,
)


def server_config(model: Path, config: BenchConfig) -> ServeConfig:
    """How ``model`` is served while it is measured."""
    # Of a user's prompts, the model reads what it can.
    room = {"random": config.max_model_len, "sharegpt": SHAREGPT_TOTAL, "custom": 0}[config.dataset_name]
    return ServeConfig(
        dtype=config.dtype,
        max_model_len=min(room, longest_of(model) or room),
        enforce_eager=config.enforce_eager,
        kvcache_gib=config.kvcache_gib,
        gpu_memory_utilization=0.0 if serves_on_cpu() else 0.45,  # two servers share the GPU
        trust_remote_code=config.trust_remote_code,
        # A model's own generation_config could set a temperature; cached prefixes would be measured, not computed.
        extra=("--generation-config", "vllm", "--no-enable-prefix-caching"),
    )


def bench_serve(
    client: BenchClient,
    server: RunningServer,
    tokenizer: Path,
    config: BenchConfig,
    *,
    request_rate: float,
    seed: int,
    result: Path,
) -> dict[str, float]:
    """Requests to a running server; METRICS and COUNTS.

    Args:
        client: that sends them.
        server: what is measured.
        tokenizer: folder of the tokenizer that makes the prompts.
        config: lengths, requests, warm-ups.
        request_rate: arrivals per second; 0: all at once.
        seed: of the prompts and of the arrivals.
        result: vLLM's own JSON; its log lies beside it.

    Raises:
        ServerError: the command failed, a request failed, or an answer has another length.
    """
    arguments = ["--base-url", server.url, "--model", server.model_name, "--tokenizer", str(tokenizer.resolve())]
    arguments += [*serve_arguments(config), "--seed", str(seed)]
    arguments += ["--num-prompts", str(config.num_prompts), "--num-warmups", str(config.num_warmups)]
    arguments += ["--request-rate", str(request_rate or "inf"), "--ignore-eos", "--temperature", "0"]
    arguments += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,95,99", "--disable-tqdm"]
    arguments += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
    if config.max_concurrency:
        arguments += ["--max-concurrency", str(config.max_concurrency)]
    if config.trust_remote_code:
        arguments.append("--trust-remote-code")
    log = result.with_suffix(".log")
    result.unlink(missing_ok=True)  # an older run's figures must not be taken for this one's
    figures = _figures("serve", client.run(arguments, log, config.run_timeout_s), result, log)
    if figures["failed"] or figures["completed"] != config.num_prompts:
        raise ServerError(
            f"{figures['completed']} of {config.num_prompts} requests to the {server.model_name} model completed, "
            f"{figures['failed']} failed; {log_tail(server.log)}"
        )
    if figures["total_output_tokens"] != config.num_prompts * config.output_len:
        raise ServerError(
            f"the {server.model_name} model wrote {figures['total_output_tokens']} tokens; "
            f"{config.num_prompts} x {config.output_len} were requested"
        )
    return {name: figures[name] for name in (*METRICS, *COUNTS)}  # paths and dates stay behind


def bench_throughput(model: Path, config: BenchConfig, *, seed: int, result: Path) -> dict[str, float]:
    """All requests at once in an engine of its own, without a server: THROUGHPUT_METRICS and ``duration`` (seconds).

    Raises:
        ServerError: the command failed, or it did other work than requested.
    """
    arguments = ["--dataset-name", "random", "--random-range-ratio", "0", "--seed", str(seed)]
    arguments += ["--random-input-len", str(config.input_len), "--random-output-len", str(config.output_len)]
    arguments += ["--num-prompts", str(config.num_prompts), "--num-warmups", str(config.num_warmups)]
    figures, log = _run("throughput", arguments, result, model, config)
    written = int(_last(r"Total num output tokens:\s+(\d+)", log))
    requested = config.num_prompts * config.output_len
    if figures["num_requests"] != config.num_prompts or written != requested:
        raise ServerError(
            f"{model} returned {written} tokens for {figures['num_requests']} requests; {requested} were requested"
        )
    return {
        "output_throughput": written / figures["elapsed_time"],
        "total_token_throughput": figures["tokens_per_second"],
        "request_throughput": figures["requests_per_second"],
        "total_input_tokens": figures["total_num_tokens"] - written,
        "total_output_tokens": written,
        "duration": figures["elapsed_time"],
    }


def bench_latency(model: Path, config: BenchConfig, *, seed: int, result: Path) -> dict[str, float]:
    """One request at a time in an engine of its own: LATENCY_METRICS, milliseconds for the whole request.

    Raises:
        ServerError: the command failed.
    """
    seconds = _latencies(model, config, ["--batch-size", "1", "--num-iters-warmup", "2"], seed, result)
    return {"mean_latency_ms": 1000 * statistics.mean(seconds), "p50_latency_ms": 1000 * statistics.median(seconds)}


def batch_latency_ms(model: Path, config: BenchConfig, *, seed: int, result: Path) -> float:
    """All requests as one batch in an engine of its own: the fastest of ``latency_iterations``, milliseconds.

    Other work on the machine only ever adds. The folder needs no weights: the engine makes them up, which changes no
    time.

    Raises:
        ServerError: the command failed.
    """
    arguments = ["--batch-size", str(config.num_prompts), "--num-iters-warmup", "1", "--load-format", "dummy"]
    return 1000 * min(_latencies(model, config, arguments, seed, result))


def _latencies(model: Path, config: BenchConfig, arguments: list[str], seed: int, result: Path) -> list[float]:
    """Seconds of each batch."""
    arguments = [*arguments, "--input-len", str(config.input_len), "--output-len", str(config.output_len)]
    arguments += ["--num-iters", str(config.latency_iterations), "--seed", str(seed)]
    figures, _ = _run("latency", arguments, result, model, config)
    seconds: list[float] = figures["latencies"]
    if len(seconds) != config.latency_iterations:
        raise ServerError(f"{len(seconds)} of {config.latency_iterations} batches to {model} were measured")
    return seconds


def _run(
    kind: Literal["throughput", "latency"], arguments: list[str], result: Path, model: Path, config: BenchConfig
) -> tuple[dict[str, Any], Path]:
    """Run the command in an engine of its own."""
    served = server_config(model, config)
    command = [sys.executable, "-P", "-m", "deploy.engines.vllm_entry", "bench", kind, *arguments]
    command += ["--model", str(model.resolve()), "--dtype", config.dtype, "--no-enable-prefix-caching"]
    command += ["--max-model-len", str(served.max_model_len), "--output-json", str(result)]
    command += ["--gpu-memory-utilization", "0.3" if serves_on_cpu() else "0.9", "--generation-config", "vllm"]
    command += ["--enforce-eager"] * config.enforce_eager + ["--trust-remote-code"] * config.trust_remote_code
    log = result.with_suffix(".log")
    result.unlink(missing_ok=True)  # an older run's figures must not be taken for this one's
    process = start_session(command, child_environment(served), log)
    try:
        code = process.wait(config.run_timeout_s)
    except subprocess.TimeoutExpired:
        raise ServerError(
            f"vllm bench {kind} did not end within {config.run_timeout_s:.0f} s; {log_tail(log)}"
        ) from None
    finally:
        stop_session(process)
    return _figures(kind, code, result, log), log


def _figures(kind: str, code: int, result: Path, log: Path) -> dict[str, Any]:
    """What the command wrote; it may exit with 0 and have written nothing."""
    if code != 0 or not result.is_file():
        raise ServerError(f"vllm bench {kind} ended with code {code}; {log_tail(log)}")
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def _last(pattern: str, log: Path) -> str:
    matches: list[str] = re.findall(pattern, log.read_text(errors="replace"))
    if not matches:
        raise ServerError(f"vllm bench did not say {pattern!r}; {log_tail(log)}")
    return matches[-1]
