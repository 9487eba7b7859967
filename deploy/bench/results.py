"""The results of a benchmark of dense against pruned: the schema of bench.json, documented in docs/bench.md."""

import dataclasses
import statistics
from dataclasses import asdict, dataclass
from typing import Any, Literal

from deploy.serving.server import ServerError

SCHEMA = 2  # of bench.json; 1 had one load and no offline runs
LATENCIES = tuple(
    f"{stat}_{kind}_ms" for kind in ("ttft", "tpot", "itl", "e2el") for stat in ("mean", "p50", "p95", "p99")
)
METRICS = ("output_throughput", "total_token_throughput", "request_throughput", *LATENCIES)
COUNTS = ("num_prompts", "completed", "failed", "total_input_tokens", "total_output_tokens", "duration")
# Of the offline runs: requests, tokens per second; seconds of one batch from first token read to last token written.
THROUGHPUT_METRICS = ("output_throughput", "total_token_throughput", "request_throughput")
LATENCY_METRICS = ("mean_latency_ms", "p50_latency_ms")
SIDES: tuple[Literal["dense", "pruned"], ...] = ("dense", "pruned")


@dataclass(frozen=True)
class Ratio:
    """A figure of each pair, such as pruned over dense: median and extremes of the pairs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Ratio":
        """Median, lowest and highest of one value per pair."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Paired:
    """Runs of both models, taken in turn.

    Attributes:
        dense, pruned: one dict of figures per pair.
        ratios: per metric, pruned over dense: above 1 is better for throughputs, below 1 for times.
    """

    dense: list[dict[str, float]]
    pruned: list[dict[str, float]]
    ratios: dict[str, Ratio]

    @classmethod
    def of(cls, dense: list[dict[str, float]], pruned: list[dict[str, float]], metrics: tuple[str, ...]) -> "Paired":
        """Of the runs of both models, pair by pair, with the ratios of ``metrics``.

        Raises:
            ServerError: when the dense model measured 0, as the time between tokens where all come at once.
        """
        pairs = list(zip(dense, pruned, strict=True))
        for name in metrics:
            if any(run[name] == 0 for run in dense):
                raise ServerError(
                    f"the dense model's {name} is 0, so nothing compares with it: its answers came in one piece; "
                    "ask for longer ones (output_len)"
                )
        return cls(dense, pruned, {name: Ratio.of([p[name] / d[name] for d, p in pairs]) for name in metrics})

    def median(self, side: Literal["dense", "pruned"], metric: str) -> float:
        """The median of one model's runs."""
        return statistics.median(run[metric] for run in (self.dense if side == "dense" else self.pruned))

    def to_metrics(self, prefix: str) -> dict[str, float]:
        """Flat names for MLflow: medians of both models and of the ratios."""
        flat: dict[str, float] = {}
        for name, ratio in self.ratios.items():
            flat |= {f"{prefix}{side}/{name}": self.median(side, name) for side in SIDES}
            flat[f"{prefix}ratio/{name}"] = ratio.median
        return flat


@dataclass(frozen=True)
class Load:
    """Requests as they arrive at a running server.

    Attributes:
        name: "full" (all at once), "75pct" (of the dense model's request throughput) or "2.5rps", as requested.
        request_rate: arrivals per second (Poisson); 0: all at once.
        runs: METRICS and COUNTS of each run (tokens per second, milliseconds, seconds).
    """

    name: str
    request_rate: float
    runs: Paired


@dataclass(frozen=True)
class Footprint:
    """What one model takes.

    Attributes:
        file_bytes: of its safetensors files.
        start_seconds: from the command to the first healthy answer; dense starts first, on colder caches.
        load_seconds: reading the weights alone, as vLLM says; None where it does not.
        kv_cache_tokens: that fit beside the weights, as vLLM says; None where it does not.
        peak_memory_bytes: of the server, KV cache included. On CPU the sum of its processes' highest resident memory
            (a library that two of them map counts twice), on a GPU its memory there; None where it cannot be read.
    """

    file_bytes: int
    start_seconds: float
    load_seconds: float | None
    kv_cache_tokens: int | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Saving:
    """How much of the time that could be saved was saved (deploy/bench/efficiency.py says what is counted).

    Attributes:
        operations, bytes: shares of the dense model's that the pruned one does without, over the same requests.
        time: the share of time saved, of each pair.
        efficiency: ``time`` over the larger of the two shares: 1 saves all of it, 0 nothing.
    """

    operations: float
    bytes: float
    time: Ratio
    efficiency: Ratio


@dataclass(frozen=True)
class BenchReport:
    """What was measured. ``to_dict`` is the schema of bench.json.

    Attributes:
        schema: version of this layout.
        config: the BenchConfig.
        environment: versions, device and cores.
        loads: servers under load; the first is all requests at once.
        throughput, latency: offline runs; None where they were not requested.
        savings: by "serving" (all at once), "throughput" and "latency"; empty where nothing could be saved.
        drift: the last dense run's speed over the first's, by the same names.
        footprints: by "dense" and "pruned".
        seconds: of the whole benchmark.
    """

    schema: int
    config: dict[str, Any]
    environment: dict[str, Any]
    loads: list[Load]
    throughput: Paired | None
    latency: Paired | None
    savings: dict[str, Saving]
    drift: dict[str, float]
    footprints: dict[str, Footprint]
    seconds: float

    @property
    def full(self) -> Paired:
        """The runs with all requests sent at once."""
        return self.loads[0].runs

    @property
    def machine(self) -> str:
        """What it was measured on, as benchmarks on the same name compare: the device, and how many cores."""
        return f"{self.environment['device']}, {self.environment['cores']} cores"

    @property
    def ratios(self) -> dict[str, Ratio]:
        """Pruned over dense with all requests sent at once."""
        return self.full.ratios

    @property
    def metrics(self) -> dict[str, float]:
        """Flat names for MLflow: medians of the runs and of the pairs."""
        flat = self.full.to_metrics("")
        flat["ratio/output_throughput_low"] = self.ratios["output_throughput"].low
        flat["ratio/output_throughput_high"] = self.ratios["output_throughput"].high
        for load in self.loads[1:]:
            flat |= load.runs.to_metrics(f"load_{load.name}/") | {f"load_{load.name}/request_rate": load.request_rate}
        for name, runs in (("throughput", self.throughput), ("latency", self.latency)):
            flat |= runs.to_metrics(f"offline_{name}/") if runs else {}
        for name, saving in self.savings.items():
            flat |= {f"efficiency/{name}": saving.efficiency.median, f"time_saved/{name}": saving.time.median}
        flat |= {f"drift/{name}": value for name, value in self.drift.items()}
        for side, footprint in self.footprints.items():
            flat |= {f"{side}/{name}": value for name, value in asdict(footprint).items() if value is not None}
        return flat

    def to_dict(self) -> dict[str, Any]:
        """As ``bench.json`` holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BenchReport":
        """The inverse of ``to_dict``.

        Raises:
            ValueError: when it is of another schema, or a field is missing or unknown.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f"bench.json has schema {data.get('schema')}; this version reads {SCHEMA}: measure again")
        try:
            made = cls(
                **data
                | {
                    "loads": [Load(**load | {"runs": _paired(load["runs"])}) for load in data["loads"]],
                    "throughput": _paired(data["throughput"]) if data["throughput"] else None,
                    "latency": _paired(data["latency"]) if data["latency"] else None,
                    "savings": {name: _saving(saving) for name, saving in data["savings"].items()},
                    "footprints": {side: Footprint(**facts) for side, facts in data["footprints"].items()},
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"bench.json is damaged: {error}") from None
        return made


def _paired(data: dict[str, Any]) -> Paired:
    return dataclasses.replace(Paired(**data), ratios={name: Ratio(**ratio) for name, ratio in data["ratios"].items()})


def _saving(data: dict[str, Any]) -> Saving:
    return Saving(**data | {"time": Ratio(**data["time"]), "efficiency": Ratio(**data["efficiency"])})
