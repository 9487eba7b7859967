"""What a benchmark of dense against pruned found, and the schema of bench.json."""

import dataclasses
import statistics
from dataclasses import asdict, dataclass
from typing import Any

LATENCIES = tuple(
    f"{stat}_{kind}_ms" for kind in ("ttft", "tpot", "itl", "e2el") for stat in ("mean", "p50", "p95", "p99")
)
METRICS = ("output_throughput", "total_token_throughput", "request_throughput", *LATENCIES)
COUNTS = ("num_prompts", "completed", "failed", "total_input_tokens", "total_output_tokens", "duration")


@dataclass(frozen=True)
class Ratio:
    """Pruned over dense, of the pairs: their median and extremes."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchReport:
    """What was measured. ``to_dict`` is the schema of bench.json.

    Attributes:
        config: the BenchConfig.
        environment: versions, device and cores.
        dense, pruned: one dict per pair with METRICS and COUNTS (tokens per second, milliseconds, seconds).
        ratios: per metric, pruned over dense: above 1 is better for throughputs, below 1 for times.
        drift: the last dense run's output throughput over the first's; None where it was not measured.
        start_seconds, load_seconds, file_bytes, kv_cache_tokens: by "dense" and "pruned". Start is from the command to
            the first healthy answer; dense starts first, on colder caches. Load is reading the weights alone.
        seconds: of the whole benchmark.
    """

    config: dict[str, Any]
    environment: dict[str, Any]
    dense: list[dict[str, float]]
    pruned: list[dict[str, float]]
    ratios: dict[str, Ratio]
    drift: float | None
    start_seconds: dict[str, float]
    load_seconds: dict[str, float]
    file_bytes: dict[str, int]
    kv_cache_tokens: dict[str, int]
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """Flat names for MLflow: dense/..., pruned/... (medians of the runs), ratio/... (medians of the pairs)."""
        flat: dict[str, float] = {}
        for side, runs in (("dense", self.dense), ("pruned", self.pruned)):
            flat |= {f"{side}/{name}": statistics.median(run[name] for run in runs) for name in METRICS}
            flat[f"{side}/start_seconds"] = self.start_seconds[side]
            flat[f"{side}/load_seconds"] = self.load_seconds[side]
            flat[f"{side}/file_bytes"] = self.file_bytes[side]
            flat[f"{side}/kv_cache_tokens"] = self.kv_cache_tokens[side]
        flat |= {f"ratio/{name}": ratio.median for name, ratio in self.ratios.items()}
        flat["ratio/output_throughput_low"] = self.ratios["output_throughput"].low
        flat["ratio/output_throughput_high"] = self.ratios["output_throughput"].high
        if self.drift is not None:
            flat["drift"] = self.drift
        return flat

    def to_dict(self) -> dict[str, Any]:
        """As ``bench.json`` holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BenchReport":
        """The inverse of ``to_dict``."""
        ratios = {name: Ratio(**ratio) for name, ratio in data["ratios"].items()}
        return cls(**{**{field.name: data[field.name] for field in dataclasses.fields(cls)}, "ratios": ratios})
