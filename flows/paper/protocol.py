"""Read the config files beside this one: a folder for each table of the paper, and in it a file for each run.

``measures.yaml`` says how each figure is measured, a folder's ``table.yaml`` which runs and figures the table has.
"""

import dataclasses
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deploy.bench.config import BenchConfig
from slimgpt.config import EvalConfig, PruneConfig, RecoverConfig, paper_preset

HERE = Path(__file__).parent
SIDES = ("dense", "pruned", "recovered")
SPEED = ("latency", "latency_dense")


@dataclass(frozen=True)
class Measure:
    """One figure of a model.

    Attributes:
        name: in the config files.
        title: for people.
        evaluation: name of the evaluation that gives it; empty where another stage does.
        metric: of that evaluation.
        scale: what the metric is multiplied by.
        mean: names of the measures whose mean it is.
    """

    name: str
    title: str
    evaluation: str = ""
    metric: str = ""
    scale: float = 1.0
    mean: tuple[str, ...] = ()


@dataclass(frozen=True)
class PaperRun:
    """One run of the paper.

    Attributes:
        name: of its file.
        title: for people.
        ratio: as the paper names it; 0 for the dense model.
        parameters: what the pruned model has in the paper, such as 5.44B; empty where it says nothing.
        prune: what differs from the paper's preset.
        recover: how it is trained then; None: not at all.
        figures: who measured it (``paper`` or others) -> side (dense, pruned, recovered) -> measure -> figure.
    """

    name: str
    title: str
    ratio: float = 0.0
    parameters: str = ""
    prune: dict[str, Any] = field(default_factory=dict)
    recover: RecoverConfig | None = None
    figures: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[str, ...]:
        """Which models it has figures of."""
        if not self.ratio:
            return SIDES[:1]
        return SIDES[1:] if self.recover is not None else SIDES[1:2]

    def pruning(self, share: float, own: bool) -> PruneConfig:
        """How the model is pruned.

        Args:
            share: of the paper's calibration sequences.
            own: whether the model is the paper's, which then comes to the paper's number of parameters.
        """
        settings = {**paper_preset(self.ratio), **self.prune}
        settings["num_samples"] = max(1, round(share * settings["num_samples"]))
        if own and self.parameters:
            del settings["ratio"]
            settings["target_parameters"] = self.parameters
        return PruneConfig(**settings)


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper.

    Attributes:
        name: of its folder.
        title: for people.
        model: hub id of the paper's model.
        parameters: of that model, by which it is known.
        runs: in their order.
        measures: of every run, in their order.
        known: every measure by name, those included that are only parts of a mean.
        ratios: at which other models are pruned, besides the paper's.
        bench: the load, where speed is measured.
        orders: what the paper's figures say: the runs from the best to the worst, by which measure.
        remarks: what the paper leaves open, and how it is taken.
    """

    name: str
    title: str
    model: str
    parameters: int
    runs: tuple[PaperRun, ...]
    measures: tuple[Measure, ...]
    known: dict[str, Measure]
    ratios: tuple[float, ...] = ()
    bench: BenchConfig | None = None
    orders: tuple[dict[str, Any], ...] = ()
    remarks: tuple[str, ...] = ()

    def is_own(self, parameters: int) -> bool:
        """Whether a model with so many parameters is taken for the paper's."""
        return abs(parameters - self.parameters) < 0.01 * self.parameters

    def figure(self, measure: Measure, metrics: dict[str, dict[str, float]]) -> float:
        """A measure's figure, given the metrics of each evaluation by name."""
        if measure.mean:
            return statistics.fmean(self.figure(self.known[part], metrics) for part in measure.mean)
        return measure.scale * metrics[measure.evaluation][measure.metric]

    def further_runs(self) -> list[PaperRun]:
        """The pruned runs at the ratios that other models are tried at, too."""
        return [
            dataclasses.replace(run, ratio=ratio, parameters="", figures={})
            for ratio in self.ratios
            for run in self.runs
            if run.ratio
        ]


def table_names() -> list[str]:
    """Every table's name."""
    return sorted(path.parent.name for path in HERE.glob("*/table.yaml"))


def read_table(name: str) -> PaperTable:
    """Read a table.

    Raises:
        ValueError: when there is none of the name; those there are.
    """
    if name not in table_names():
        raise ValueError(f"table {name!r} is not known; known are {', '.join(table_names())}")
    data = _read(HERE / name / "table.yaml")
    known = {
        key: Measure(name=key, **{**settings, "mean": tuple(settings.get("mean", ()))})
        for key, settings in _read(HERE / "measures.yaml")["measures"].items()
    }
    measures = tuple(known[key] for key in data.pop("measures"))
    runs = [_run(HERE / name / f"{key}.yaml") for key in data.pop("rows")]
    bench = BenchConfig(**data.pop("bench")) if "bench" in data else None
    lists: dict[str, Any] = {key: tuple(data.pop(key, ())) for key in ("ratios", "orders", "remarks")}
    return PaperTable(name=name, runs=tuple(runs), measures=measures, known=known, bench=bench, **lists, **data)


def evaluations(names: set[str], limit: int, max_blocks: int, own: bool) -> dict[str, EvalConfig]:
    """How the evaluations of these names are made.

    Args:
        names: as measures name them.
        limit: documents of each task; 0: all.
        max_blocks: of each perplexity; 0: the paper's.
        own: whether the model is the paper's; others get BOS by their own habit.
    """
    known, configs = _read(HERE / "measures.yaml")["evaluations"], {}
    for name, settings in known.items():
        if name in names:
            config = EvalConfig(**{"tasks": "none", "limit": limit, **settings})
            most = max_blocks if not config.max_blocks else min(max_blocks, config.max_blocks)
            changed: dict[str, Any] = ({"max_blocks": most} if max_blocks else {}) | ({} if own else {"bos": "auto"})
            configs[name] = dataclasses.replace(config, **changed)
    return configs


def _run(path: Path) -> PaperRun:
    data = _read(path)
    recover = RecoverConfig(**data.pop("recover")) if "recover" in data else None
    return PaperRun(name=path.stem, recover=recover, **data)


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())  # type: ignore[no-any-return]
