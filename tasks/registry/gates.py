"""What a version must measure up to before an alias moves to it: gates, and how they are judged. Needs no MLflow."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from slimgpt.config import check_limits, option
from slimgpt.evaluation.metrics import percent, quoted_metrics

# Settings that change no figure, only its precision or the time it takes.
# What was measured is known by the metrics' names.
_NO_MATTER = (
    *("evaluation.batch_size", "evaluation.tasks", "evaluation.perplexity"),
    *("bench.pairs", "bench.num_warmups", "bench.show_drift"),
)


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """The gates of a promotion; 0 turns one off.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    max_perplexity_ratio: float = option(
        2.5, "Perplexity over that of the dense model of the same run; 0: no limit.", ge=0
    )
    min_accuracy_retention: float = option(
        0.8, "Mean accuracy over that of the dense model of the same run; 0: no limit.", ge=0
    )
    min_speedup: float = option(1.0, "Output throughput over that of the dense model; 0: no limit.", ge=0)
    champion_max_perplexity_ratio: float = option(
        1.1, "Perplexity over that of the version that has the alias now; 0: no limit.", ge=0
    )
    champion_min_accuracy_retention: float = option(
        0.95, "Mean accuracy over that of the version that has the alias now; 0: no limit.", ge=0
    )
    champion_min_speedup: float = option(
        0.9, "Output throughput over that of the version that has the alias now; 0: no limit.", ge=0
    )

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class Figures:
    """What one run measured.

    Args:
        base_model: name of the model that the pruned one was compared with.
        dense, pruned: evaluation metrics by name: ``wikitext2/perplexity``, ``piqa/acc_norm``.
        speedup: pruned over dense output throughput; None where it was not measured.
        settings: how it was measured: ``evaluation.seq_len``, ``bench.input_len``, ``data.piqa`` (a digest),
            ``bench_machine``.
    """

    base_model: str
    dense: dict[str, float] = field(default_factory=dict)
    pruned: dict[str, float] = field(default_factory=dict)
    speedup: float | None = None
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def perplexity(self) -> str:
        """The name of the perplexity that was measured, or an empty string."""
        return next((name for name in self.pruned if name.endswith("/perplexity")), "")

    @property
    def accuracies(self) -> list[str]:
        """The metric that is quoted for each task."""
        return list(quoted_metrics(self.pruned).values())


@dataclass(frozen=True)
class Gate:
    """One gate, judged.

    Args:
        name: the field of GateConfig.
        limit: of the config.
        value: as measured; None where it could not be judged.
        problem: empty where it is passed, else why not and by how much.
    """

    name: str
    limit: float
    value: float | None
    problem: str = ""

    def __str__(self) -> str:
        shown = "not known" if self.value is None else f"{self.value:.4f}"
        return f"{self.name}: {self.problem or f'{shown}, limit {self.limit:g}'}"


def judge(candidate: Figures, champion: Figures | None, config: GateConfig) -> list[Gate]:
    """Judge every gate that has a limit. A figure that is missing, not a number or not comparable does not pass."""
    gates = []
    for name, value in _measured(candidate, champion):
        limit = getattr(config, name)
        if limit == 0:
            continue
        if not isinstance(value, str) and math.isnan(value):  # neither above nor below any limit
            value = "what was measured is not a number (nan)"
        if isinstance(value, str):
            gates.append(Gate(name, limit, None, f"{value}; measure it, or set {name} to 0"))
        elif name.endswith("max_perplexity_ratio"):
            gates.append(at_most(name, limit, value))
        else:
            under = f"{value:.4f}, {limit - value:.4f} below the limit {limit:g}"
            gates.append(Gate(name, limit, value, under if value < limit else ""))
    return gates


def at_most(name: str, limit: float, value: float) -> Gate:
    """The gate of a figure that must not be above its limit."""
    over = f"{value:.4f}, {value - limit:.4f} above the limit {limit:g}"
    return Gate(name, limit, value, over if value > limit else "")


def _measured(new: Figures, old: Figures | None) -> Iterator[tuple[str, float | str]]:
    """Each gate's figure, or why there is none."""
    yield "max_perplexity_ratio", _ratio(new.pruned, new.dense, [new.perplexity], "perplexity")
    yield "min_accuracy_retention", _ratio(new.pruned, new.dense, new.accuracies, "accuracy")
    yield "min_speedup", "no throughput was measured" if new.speedup is None else new.speedup
    if old is None:
        return
    data = _difference(new, old, "evaluation.", "data.")
    tasks = "" if sorted(new.accuracies) == sorted(old.accuracies) else "other tasks were measured of it"
    same = "" if old.perplexity in (new.perplexity, "") else "another perplexity was measured of it"
    yield (
        "champion_max_perplexity_ratio",
        data or same or _ratio(new.pruned, old.pruned, [new.perplexity], "perplexity"),
    )
    yield (
        "champion_min_accuracy_retention",
        data or tasks or _ratio(new.pruned, old.pruned, new.accuracies, "accuracy"),
    )
    yield "champion_min_speedup", _speed(new, old)


def _ratio(ours: dict[str, float], theirs: dict[str, float], names: list[str], what: str) -> float | str:
    if not names or not all(name in ours and name in theirs for name in names):
        return f"no {what} was measured"
    below = statistics.mean(percent(name, theirs[name]) for name in names)
    return (
        statistics.mean(percent(name, ours[name]) for name in names) / below
        if below
        else f"the {what} to compare with is 0"
    )


def _speed(new: Figures, old: Figures) -> float | str:
    """Speed-ups over one and the same dense model compare; those over different ones say nothing."""
    if new.speedup is None or old.speedup is None:
        return "no throughput was measured" + ("" if new.speedup is None else " of it")
    if new.base_model != old.base_model:
        return f"it came from another model ({old.base_model}), so speed-ups do not compare"
    return _difference(new, old, "bench.", "bench_machine") or new.speedup / old.speedup


def _difference(new: Figures, old: Figures, *kinds: str) -> str:
    """What differs in how the two were measured, or an empty string; a setting that only one has does not count."""
    for name in sorted(new.settings.keys() & old.settings.keys()):
        if name.startswith(kinds) and name not in _NO_MATTER and new.settings[name] != old.settings[name]:
            return f"it was measured with another {name} ({old.settings[name]}, here {new.settings[name]})"
    return ""


def refusals(gates: list[Gate]) -> str:
    """The gates that were not passed, in one line; empty where all were."""
    return "; ".join(str(gate) for gate in gates if gate.problem)


def to_dict(gates: list[Gate]) -> list[dict[str, Any]]:
    """As the audit trail holds them."""
    return [{"gate": gate.name, "limit": gate.limit, "value": gate.value, "passed": not gate.problem} for gate in gates]
