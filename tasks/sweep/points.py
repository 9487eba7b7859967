"""The grid of a sweep: every point planned before any long work, and whether its limits can be judged."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.config import EvalConfig, PruneConfig, RecoverConfig
from slimgpt.evaluation.harness import EvalResult
from tasks.environment import RunFolder, Workspace
from tasks.preflight.chain import Chain, Stage, plan_chain
from tasks.preflight.models import ResolvedModel
from tasks.registry.live_run import LiveRun
from tasks.registry.names import default_name
from tasks.steps.recovery import stages_of
from tasks.sweep.config import SweepConfig


@dataclass(frozen=True)
class Point:
    """One model to try: a dense one, how it is pruned and trained, and the stages that this takes."""

    dense: ResolvedModel
    config: PruneConfig
    recover: RecoverConfig
    stages: list[Stage]
    chain: Chain

    @property
    def model(self) -> str:
        """The dense model's name, without the folder it is in."""
        return self.dense.label

    @property
    def title(self) -> str:
        """What tables, plots and MLflow call it."""
        return title_of(self.dense, self.config)

    def folder(self, workspace: Workspace) -> RunFolder:
        """Where its files go: the folder that ``compress`` uses for the same model."""
        return folder_of(self.chain, workspace)


@dataclass(frozen=True)
class Tried:
    """A point that was pruned and evaluated; its files are in ``folder``, its figures in the MLflow ``run``."""

    point: Point
    pruned: Checkpoint
    evaluation: EvalResult
    folder: RunFolder
    run: LiveRun


def grid_of(
    models: list[ResolvedModel],
    grid: SweepConfig,
    prune: PruneConfig,
    recover: RecoverConfig,
    teacher: Path | None = None,
) -> list[Point]:
    """Every point of the grid, each planned: what cannot be pruned is found before any long work.

    Args:
        models: dense ones.
        grid: ratios and schedules.
        prune: the rest of how they are pruned.
        recover: how they are trained then; no tokens: not at all.
        teacher: folder of the model that they learn from; None for the dense one.

    Raises:
        ValueError: naming the point and what is missing, or the models whose names are the same.
    """
    names = [dense.label for dense in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        same = ", ".join(dense.name for dense, name in zip(models, names, strict=True) if name in twice)
        raise ValueError(f"models holds {same}, which have the same name in tables; give their folders different names")
    if prune.target:
        raise ValueError(f"prune.{prune.target[0]} is given; a sweep tries the ratios of its grid: leave it out")
    points = []
    for dense in models:
        tokens = None  # the same at every point
        for schedule in grid.schedules:
            for ratio in grid.ratios:
                config = dataclasses.replace(prune, ratio=ratio, schedule=cast(Any, schedule))  # checked by the grid
                try:
                    stages = stages_of(config, recover, teacher)
                    points.append(Point(dense, config, recover, stages, plan_chain(dense, stages, tokens)))
                except ValueError as error:
                    raise ValueError(f"{title_of(dense, config)}: {error}") from None
                tokens = points[-1].chain.stages[-1].after.tokens
    return points


def check_judgeable(grid: SweepConfig, evaluation: EvalConfig, no_serving: str) -> None:
    """Refuse limits and preferences in figures that will not be measured.

    Args:
        grid: its limits and preference.
        evaluation: what will be measured.
        no_serving: why vLLM cannot run here; "" where it can.

    Raises:
        ValueError: naming the setting, why its figure will be missing, and what to set.
    """
    why = {
        "speed": f"throughput cannot be measured here ({no_serving})" if no_serving else "",
        "perplexity": "the evaluation measures no perplexity" if evaluation.perplexity == "none" else "",
        "accuracy": "" if evaluation.tasks else "the evaluation has no task",
    }
    limits = {"speed": "min_speedup", "perplexity": "max_perplexity_ratio", "accuracy": "min_accuracy_retention"}
    for figure, setting in limits.items():
        if why[figure] and getattr(grid, setting):
            raise ValueError(f"{setting} is {getattr(grid, setting):g}, and {why[figure]}; set {setting} to 0")
        if why[figure] and grid.prefer == figure:
            raise ValueError(f"prefer is {figure!r}, and {why[figure]}; prefer size")


def title_of(dense: ResolvedModel, config: PruneConfig) -> str:
    """What tables, plots and MLflow call a model that is pruned so."""
    return f"{dense.label} {100 * config.ratio:g}% {config.schedule}"


def folder_of(chain: Chain, workspace: Workspace) -> RunFolder:
    """The folder that ``compress`` uses for the same model."""
    return workspace.run(default_name(chain.dense.label), chain.facts())
