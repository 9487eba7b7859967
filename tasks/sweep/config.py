"""What a sweep tries, what it runs on, and which of the results is registered. Needs neither Prefect nor MLflow."""

from dataclasses import dataclass
from typing import Any, Literal

from slimgpt.config import MAX_RATIO, check_limits, option
from tasks.registry.gates import GateConfig

SCHEDULES = ("nats", "log", "linear", "uniform", "log_decreasing", "linear_decreasing")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A grid of prunings, and the limits within which the best of them is registered.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    ratios: tuple[float, ...] = option((0.2, 0.35, 0.5), "Ratios to try; one model per MODEL, ratio and schedule.")
    schedules: tuple[str, ...] = option(("nats",), f"Schedules to try: {', '.join(SCHEDULES)}.")
    runner: Literal["threads", "dask"] = option(
        "threads", "What prunes and evaluates: threads of the flow's process, or Dask's workers."
    )
    workers: int = option(
        1, "Models that are pruned and evaluated at once, where memory holds them; timings are taken alone.", ge=1
    )
    dask_scheduler: str = option(
        "", "dask: address of a scheduler whose workers see the runs folder under the same path; empty starts one here."
    )
    measure_speed: bool = option(True, "Serve each model and its dense one with vLLM, and measure both.")
    prefer: Literal["size", "speed", "perplexity", "accuracy"] = option(
        "size", "Of the models within the limits, the best in this is registered."
    )
    max_size_ratio: float = option(0.0, "Weight files over those of the dense model; 0: no limit.", ge=0)
    max_perplexity_ratio: float = option(2.5, "Perplexity over that of the dense model; 0: no limit.", ge=0)
    min_accuracy_retention: float = option(0.8, "Mean accuracy over that of the dense model; 0: no limit.", ge=0)
    min_speedup: float = option(0.0, "Output throughput over that of the dense model; 0: no limit.", ge=0)

    def __post_init__(self) -> None:
        for name, kind in (("ratios", float), ("schedules", str)):
            given: Any = getattr(self, name)  # JSON and YAML bring lists
            values = (given,) if isinstance(given, str | float | int) else tuple(given)
            object.__setattr__(self, name, tuple(dict.fromkeys(kind(value) for value in values)))
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        check_limits(self)
        for ratio in self.ratios:
            if not 0 < ratio <= MAX_RATIO:
                raise ValueError(f"ratios holds {ratio:g}; each must be more than 0 and at most {MAX_RATIO}")
        for schedule in self.schedules:
            if schedule not in SCHEDULES:
                raise ValueError(f"schedules holds {schedule!r}; each must be one of {', '.join(SCHEDULES)}")
        if self.dask_scheduler and self.runner != "dask":
            raise ValueError(
                f"dask_scheduler is {self.dask_scheduler!r} and runner is {self.runner!r}; it belongs to runner='dask'"
            )

    @property
    def gates(self) -> GateConfig:
        """The limits as gates against the dense model."""
        return GateConfig(
            max_perplexity_ratio=self.max_perplexity_ratio,
            min_accuracy_retention=self.min_accuracy_retention,
            min_speedup=self.min_speedup,
        )
