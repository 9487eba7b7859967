"""The end of a sweep: the models beside each other, the best of them chosen, every one a run in MLflow."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from deploy.report.comparison import Comparison
from deploy.report.pareto import HEADER, SweptModel, best_model, pareto_front, sweep_plots, sweep_rows
from deploy.report.plots import Plot
from slimgpt.evaluation.metrics import percent
from slimgpt.files import write_atomically
from tasks.registry.gates import Figures, Gate, at_most, judge, refusals
from tasks.steps.artifacts import publish_images
from tasks.sweep.config import SweepConfig
from tasks.sweep.points import Tried


@dataclass(frozen=True)
class Outcome:
    """The result of a sweep.

    Args:
        models: the dense ones and the pruned ones, in the order of the grid.
        chosen: what is registered; None where no model keeps to the limits.
    """

    models: list[SweptModel]
    chosen: SweptModel | None

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The table, in the order of deploy.report.pareto.HEADER."""
        return sweep_rows(self.models, self.chosen)

    @property
    def plots(self) -> list[Plot]:
        """Quality against size and speed."""
        return sweep_plots(self.models, self.chosen)

    @property
    def verdict(self) -> str:
        """The result in one line."""
        return f"best within the limits: {self.chosen.title}" if self.chosen else "none is within the limits"

    @property
    def refused(self) -> str:
        """Why nothing is registered: each model's reason."""
        return "; ".join(f"{model.title}: {model.outside}" for model in self.models if model.schedule)


def compare(tried: list[Tried], comparisons: list[Comparison], grid: SweepConfig) -> Outcome:
    """The models beside each other, and the best of them within the limits."""
    models: dict[str, SweptModel] = {}
    for one, comparison in zip(tried, comparisons, strict=True):
        models.setdefault(one.point.model, _swept(one.point.model, one, comparison, "dense", ""))
        outside = refusals(_gates(comparison, grid))
        models[one.point.title] = _swept(one.point.title, one, comparison, "pruned", outside)
    compared = list(models.values())
    return Outcome(compared, best_model(compared, grid.prefer))


def _gates(comparison: Comparison, grid: SweepConfig) -> list[Gate]:
    speedup = None if comparison.bench is None else comparison.bench.ratios["output_throughput"].median
    gates = judge(Figures(comparison.steps.base_model, comparison.dense, comparison.pruned, speedup), None, grid.gates)
    if grid.max_size_ratio:
        size = comparison.steps.after("bytes") / comparison.steps.before("bytes")
        gates.append(at_most("max_size_ratio", grid.max_size_ratio, size))
    return gates


def _swept(title: str, one: Tried, comparison: Comparison, side: str, outside: str) -> SweptModel:
    figures = comparison.dense if side == "dense" else comparison.pruned
    steps, bench = comparison.steps, comparison.bench
    accuracies = [percent(name, figures[name]) for name in comparison.accuracies.values()]
    pruned = side == "pruned"
    return SweptModel(
        title=title,
        model=one.point.model,
        ratio=steps.ratio if pruned else 0.0,
        schedule=one.point.config.schedule if pruned else "",
        megabytes=(steps.after("bytes") if pruned else steps.before("bytes")) / 1e6,
        perplexity=figures.get(comparison.perplexity_name),
        accuracy=statistics.mean(accuracies) if accuracies else None,
        throughput=None if bench is None else bench.metrics[f"{side}/output_throughput"],
        speedup=bench.ratios["output_throughput"].median if bench is not None and pruned else None,
        outside=outside,
    )


@task(name="compare the models", cache_policy=NO_CACHE, persist_result=False)
def compare_models(tried: list[Tried], comparisons: list[Comparison], grid: SweepConfig, folder: Path) -> Outcome:
    """As ``compare``; the figures go to sweep.json, the plots beside it, table and plots to the UI."""
    outcome = compare(tried, comparisons, grid)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = outcome.chosen.title if outcome.chosen else ""
    facts: dict[str, Any] = {"models": [model.to_dict() for model in outcome.models], "chosen": chosen}
    facts["front"] = [model.title for model in pareto_front(outcome.models)]
    write_atomically(folder / "sweep.json", json.dumps(facts, indent=2) + "\n")
    files = []
    for plot in outcome.plots:
        files.append(folder / f"{plot.name}.svg")
        write_atomically(files[-1], plot.svg + "\n")
    names = [name or "remark" for name in HEADER]
    table = [dict(zip(names, row, strict=True)) for row in outcome.rows]
    create_table_artifact(table, key="sweep-figures", description=outcome.verdict)
    publish_images(files, key="sweep", description="sweep")
    get_run_logger().info("%s", outcome.verdict)
    return outcome
