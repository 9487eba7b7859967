"""Dense against pruned, measured by vLLM's own benchmark so that the gain can be believed.

Both servers are up and only one is under load: dense, pruned, dense, pruned, ... and dense once more, which shows how
much the machine itself drifted. Each pair starts both anew: a server keeps for its life a speed that its next start has
not. The two runs of a pair send the same prompts; every pair sends new ones. Answers have a fixed length, the prefix
cache is off, warm-ups are dropped, and one failed request fails the benchmark. The offline runs follow once the servers
have gone, in the same order. docs/bench.md says what each figure means.
"""

import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploy.bench.client import bench_client
from deploy.bench.config import BenchConfig, check_model, longest_of
from deploy.bench.dataset import check_dataset
from deploy.bench.footprint import footprint
from deploy.bench.results import (
    LATENCY_METRICS,
    METRICS,
    SCHEMA,
    SIDES,
    THROUGHPUT_METRICS,
    BenchReport,
    Footprint,
    Load,
    Paired,
    Saving,
)
from deploy.bench.vllm_bench import bench_latency, bench_serve, bench_throughput, server_config
from deploy.engines.availability import serves_on_cpu, vllm_version
from deploy.serving.server import RunningServer, ServerError, check_servable, serving
from slimgpt.files import locked, write_atomically

__all__ = ["BenchConfig", "compare"]

Figures = dict[str, float]


def compare(
    dense: Path,
    pruned: Path,
    config: BenchConfig,
    *,
    workdir: Path,
    on_progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure both models and write ``workdir``/bench.json (servers' and clients' logs beside it).

    Raises:
        ValueError: before anything starts: vLLM cannot run here, a folder is not a checkpoint, requests are too long, a
            family is unknown.
        ServerError: a server did not start, a request failed, or the two models did not do the same work.
    """
    started = time.monotonic()
    for model in (dense, pruned):
        check_servable(model)
        check_model(model, config)
        check_dataset(model, config, longest_of(model))
    models = {"dense": dense, "pruned": pruned}
    works = _works(models, config, config.input_len)
    workdir.mkdir(parents=True, exist_ok=True)
    tell = on_progress or (lambda _: None)
    measuring = _Measuring(models, config, workdir, tell, {})
    with _alone(workdir, tell):
        loads, footprints = measuring.served()
        throughput = measuring.offline("throughput", bench_throughput) if config.offline else None
        latency = measuring.offline("latency", bench_latency) if config.offline else None
    if config.dataset_name != "random":  # how long prompts are is known by now
        tokens = round(loads[0].runs.median("dense", "total_input_tokens") / config.num_prompts)
        works["serving"] = _works(models, config, tokens)["serving"]
    shown = replace(config, dataset_path=Path(config.dataset_path).name)  # no folder of this machine
    report = BenchReport(
        schema=SCHEMA,
        config=json.loads(json.dumps(asdict(shown))),  # lists, as JSON has them
        environment=environment(),
        loads=loads,
        throughput=throughput,
        latency=latency,
        savings=_savings(works, {"serving": loads[0].runs, "throughput": throughput, "latency": latency}),
        drift=measuring.drift,
        footprints=footprints,
        seconds=time.monotonic() - started,
    )
    write_atomically(workdir / "bench.json", json.dumps(report.to_dict(), indent=2) + "\n")
    return report


@contextmanager
def _alone(workdir: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Wait for another benchmark in the same folder: each would take the other's files for its own."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(workdir))
        except BlockingIOError:
            tell(f"another benchmark writes to {workdir}: waiting for its end")
            held.enter_context(locked(workdir, wait=True))
        yield


@dataclass(frozen=True)
class _Measuring:
    models: dict[str, Path]
    config: BenchConfig
    workdir: Path
    tell: Callable[[str], None]
    drift: dict[str, float]

    def served(self) -> tuple[list[Load], dict[str, Footprint]]:
        """All loads on two servers, which each pair starts anew unless told otherwise, and what the first two took."""
        pairs: list[dict[str, dict[str, Figures]]] = []
        rates: dict[str, float] = {}
        footprints: dict[str, Footprint] = {}
        with ExitStack() as stack, ExitStack() as up:
            servers: dict[str, RunningServer] = {side: self._start(side, 0, up) for side in SIDES}
            client = stack.enter_context(bench_client(self.workdir / "client.log"))

            def run(side: str, rate: float, seed: int, result: Path) -> Figures:
                tokenizer = self.models["dense"]
                return bench_serve(
                    client, servers[side], tokenizer, self.config, request_rate=rate, seed=seed, result=result
                )

            def both(name: str, rate: float, pair: int) -> dict[str, Figures]:
                return self._pair(name, pair, lambda side, seed, result: run(side, rate, seed, result))

            for pair in range(self.config.pairs):
                if pair and self.config.restart:
                    up.close()
                    servers |= {side: self._start(side, pair, up) for side in SIDES}
                measured = {"full": both("full", 0.0, pair)}
                if pair == 0:
                    rates = dict(self._rates(measured["full"]["dense"]["request_throughput"]))
                measured |= {name: both(name, rate, pair) for name, rate in rates.items()}
                pairs.append(measured)
                footprints = footprints or {side: footprint(self.models[side], servers[side]) for side in SIDES}
            loads = [
                Load(name, rate, _paired([measured[name] for measured in pairs], METRICS))
                for name, rate in {"full": 0.0, **rates}.items()
            ]
            if self.config.show_drift:
                self._measure_drift("serving", loads[0].runs, "output_throughput", lambda s, n, r: run(s, 0, n, r))
        return loads, footprints

    def _start(self, side: str, pair: int, up: ExitStack) -> RunningServer:
        self.tell(f"starting vLLM with the {side} model")
        log = self.workdir / (f"vllm-{side}-{pair + 1}.log" if pair else f"vllm-{side}.log")
        config, model = server_config(self.models[side], self.config), self.models[side]
        serve = serving(model, config, log=log, served_name=side, timeout_s=self.config.start_timeout_s)
        server = up.enter_context(serve)
        self.tell(f"{side} model ready after {server.start_seconds:.0f} s")
        return server

    def offline(self, kind: str, bench: Callable[..., Figures]) -> Paired:
        """``vllm bench KIND`` of both models, each run in an engine of its own."""
        metrics = THROUGHPUT_METRICS if kind == "throughput" else LATENCY_METRICS

        def run(side: str, seed: int, result: Path) -> Figures:
            return bench(self.models[side], self.config, seed=seed, result=result)

        runs = _paired([self._pair(kind, pair, run) for pair in range(self.config.pairs)], metrics)
        if self.config.show_drift:
            self._measure_drift(kind, runs, metrics[0], run)
        return runs

    def _pair(self, name: str, pair: int, run: Callable[[str, int, Path], Figures]) -> dict[str, Figures]:
        """Dense, then pruned; each pair with a seed of its own."""
        both: dict[str, Figures] = {}
        for side in SIDES:
            place = f"{name}-pair{pair + 1}of{self.config.pairs}-{side}"
            both[side] = run(side, self.config.seed + pair, self.workdir / f"{place}.json")
            self.tell(f"{place}: {_told(both[side])}")
        read = [both[side].get("total_input_tokens") for side in SIDES]
        if read[0] != read[1]:
            raise ServerError(
                f"the models read {read[0]} and {read[1]} prompt tokens in {name}, pair {pair + 1}: are their "
                "tokenizers the same?"
            )
        return both

    def _measure_drift(self, name: str, runs: Paired, metric: str, run: Callable[[str, int, Path], Figures]) -> None:
        again = run("dense", self.config.seed + self.config.pairs, self.workdir / f"{name}-again-dense.json")
        self.tell(f"{name}-again-dense: {_told(again)}")
        # As speeds, so that below 1 always means that the machine became slower.
        now, before = again[metric], runs.dense[0][metric]
        self.drift[name] = before / now if metric.endswith("_ms") else now / before

    def _rates(self, capacity: float) -> Iterator[tuple[str, float]]:
        yield from ((f"{100 * share:.3g}pct", share * capacity) for share in self.config.load_shares)
        yield from ((f"{rate:.4g}rps", rate) for rate in self.config.request_rates)


def _paired(pairs: list[dict[str, Figures]], metrics: tuple[str, ...]) -> Paired:
    return Paired.of([both["dense"] for both in pairs], [both["pruned"] for both in pairs], metrics)


def _told(run: Figures) -> str:
    if "mean_latency_ms" in run:
        return f"{run['mean_latency_ms']:.0f} ms a request"
    first = f", TTFT {run['mean_ttft_ms']:.0f} ms" if "mean_ttft_ms" in run else ""
    return f"{run['output_throughput']:.0f} tokens/s{first}"


def _works(models: dict[str, Path], config: BenchConfig, input_len: int) -> dict[str, tuple[Any, Any]]:
    """The counted work of dense and pruned, by measurement. First of all: a model that cannot be read ends it here."""
    from deploy.bench.efficiency import work_of  # with transformers, seconds that --help must not cost

    def both(batch: int) -> tuple[Any, Any]:
        lengths = {"input_len": input_len, "output_len": config.output_len}
        return work_of(models["dense"], **lengths, batch=batch), work_of(models["pruned"], **lengths, batch=batch)

    together = min(config.num_prompts, config.max_concurrency or config.num_prompts)
    return {"serving": both(together), "throughput": both(config.num_prompts), "latency": both(1)}


def _savings(works: dict[str, tuple[Any, Any]], measured: dict[str, Paired | None]) -> dict[str, Saving]:
    from deploy.bench.efficiency import saving

    savings = {}
    for name, runs in measured.items():
        if runs is None:
            continue
        key = "mean_latency_ms" if name == "latency" else "duration"
        speedups = [d[key] / p[key] for d, p in zip(runs.dense, runs.pruned, strict=True)]
        if saved := saving(*works[name], speedups):
            savings[name] = saved
    return savings


def environment() -> dict[str, Any]:
    """What vLLM runs on here, and its version."""
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
