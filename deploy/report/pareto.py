"""The models of a sweep beside each other: which of them no other one beats, which one to take, as table and plots."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from deploy.report.plots import COLOURS, Plot, draw_plot, legend_above
from slimgpt.quantities import in_millions

# figure -> (label, whether more of it is better)
OBJECTIVES: dict[str, tuple[str, bool]] = {
    "perplexity": ("perplexity", False),
    "accuracy": ("mean accuracy, %", True),
    "throughput": ("new tokens per second", True),
    "megabytes": ("weight files, MB", False),
}
Preference = Literal["size", "speed", "perplexity", "accuracy"]
_PREFERRED = {"size": "megabytes", "speed": "throughput"}  # the other two are named like their figures


@dataclass(frozen=True, kw_only=True)
class SweptModel:
    """One model of a sweep. A figure that was not measured is None.

    Args:
        title: what it is called in table and plots.
        model: the dense model it came from.
        ratio: removed share of the projections; 0 for the dense model itself.
        schedule: how the ratio is spread over depth; "" for the dense model.
        megabytes: of its weight files.
        perplexity: as evaluated.
        accuracy: mean over the tasks, in percent.
        throughput: new tokens per second, the median of its benchmark's runs.
        speedup: throughput over that of the dense model, the median of the pairs.
        outside: the limits it does not keep to, in one line; "" where it keeps to all.
    """

    title: str
    model: str
    ratio: float
    schedule: str
    megabytes: float
    perplexity: float | None
    accuracy: float | None
    throughput: float | None
    speedup: float | None
    outside: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As sweep.json holds it."""
        return asdict(self)


def pareto_front(models: list[SweptModel]) -> list[SweptModel]:
    """Those that no other one equals in every figure and beats in one. A figure that one of them lacks is left out."""
    names = [name for name in OBJECTIVES if all(getattr(model, name) is not None for model in models)]

    def costs(model: SweptModel) -> list[float]:
        return [-getattr(model, name) if OBJECTIVES[name][1] else getattr(model, name) for name in names]

    def beats(one: SweptModel, other: SweptModel) -> bool:
        pairs = list(zip(costs(one), costs(other), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return [model for model in models if not any(beats(other, model) for other in models)]


def best_model(models: list[SweptModel], prefer: Preference) -> SweptModel | None:
    """The best in one figure of the pruned models that keep to the limits, the first of equals; None where none does.

    Raises:
        ValueError: when a model that could be chosen lacks the figure.
    """
    name = _PREFERRED.get(prefer, prefer)
    allowed = [model for model in models if model.schedule and not model.outside]
    if lacking := [model.title for model in allowed if getattr(model, name) is None]:
        raise ValueError(f"prefer is {prefer!r}, and no {name} was measured of {', '.join(lacking)}; prefer another")
    sign = -1 if OBJECTIVES[name][1] else 1
    return min(allowed, key=lambda model: sign * getattr(model, name), default=None)


HEADER = ("model", "MB", "perplexity", "accuracy", "tokens/s", "speed-up", "")


def sweep_rows(models: list[SweptModel], chosen: SweptModel | None) -> list[tuple[str, ...]]:
    """The table, in the order of HEADER; the last cell says what is to be known of the model."""
    front = pareto_front(models)
    return [
        (
            model.title,
            in_millions(1e6 * model.megabytes),
            _cell(model.perplexity, ".2f"),
            _cell(model.accuracy, ".1f") + (" %" if model.accuracy is not None else ""),
            _cell(model.throughput, ".0f"),
            _cell(model.speedup, ".2f"),
            _remark(model, model in front, model == chosen),
        )
        for model in models
    ]


def _remark(model: SweptModel, on_front: bool, is_chosen: bool) -> str:
    words = ["registered" if is_chosen else "", "Pareto" if on_front else "", model.outside]
    return ", ".join(word for word in words if word)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def sweep_plots(models: list[SweptModel], chosen: SweptModel | None) -> list[Plot]:
    """Perplexity and accuracy, each against size and throughput, where they were measured."""
    plots = []
    for y in ("perplexity", "accuracy"):
        for x in ("megabytes", "throughput"):
            if any(getattr(model, name) is None for model in models for name in (x, y)):
                continue
            title = f"{OBJECTIVES[y][0]} against {OBJECTIVES[x][0]}"
            caption = (
                "Grey: the dense models. The line joins those that none beats in these two; the ring is registered."
            )
            plots.append(draw_plot(f"{y}-{x}", title, caption, _scatter(x, y), (models, chosen)))
    return plots


def _scatter(x: str, y: str) -> Callable[[Any, Any], None]:
    def draw(axes: Any, data: tuple[list[SweptModel], SweptModel | None]) -> None:
        models, chosen = data
        for side, members in (
            ("dense", [model for model in models if not model.schedule]),
            ("pruned", [model for model in models if model.schedule]),
        ):
            axes.plot(*_places(members, x, y), "o", markersize=6, color=COLOURS[side], label=side)
        front = sorted(_front_of_two(models, x, y), key=lambda model: getattr(model, x))
        axes.plot(*_places(front, x, y), "--", lw=1.2, color=COLOURS["heads"], label="Pareto")
        if chosen is not None:
            axes.plot(*_places([chosen], x, y), "o", markersize=12, mfc="none", color=COLOURS["heads"])
        for model in models:
            near = (getattr(model, x), getattr(model, y))
            axes.annotate(model.title, near, textcoords="offset points", xytext=(6, 5), fontsize=7)
        axes.margins(0.18)
        axes.set(xlabel=OBJECTIVES[x][0], ylabel=OBJECTIVES[y][0])
        legend_above(axes, 3)

    return draw


def _front_of_two(models: list[SweptModel], x: str, y: str) -> list[SweptModel]:
    """Those that no other one beats where nothing but two figures counts."""
    others = {name: 0.0 for name in OBJECTIVES if name not in (x, y)}
    alike = [SweptModel(**{**model.to_dict(), **others}) for model in models]
    front = pareto_front(alike)
    return [model for model, twin in zip(models, alike, strict=True) if twin in front]


def _places(models: list[SweptModel], x: str, y: str) -> tuple[list[float], list[float]]:
    return [getattr(model, x) for model in models], [getattr(model, y) for model in models]
