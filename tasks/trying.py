"""The points of a sweep: each is pruned and evaluated, on threads or on Dask's workers."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from slimgpt.config import EvalConfig, PruneConfig
from slimgpt.harness import EvalResult
from slimgpt.harness_tasks import DataUsed
from slimgpt.plan import PrunePlan
from tasks.environment import RunFolder, Workspace
from tasks.evaluation import EvalRequest, evaluate_model
from tasks.models import ResolvedModel
from tasks.preflight import plan_pruning
from tasks.pruning import PrunedModel, PruneRequest, prune_model
from tasks.registry import default_name
from tasks.sweep_config import SweepConfig


@dataclass(frozen=True)
class Point:
    """One model to try: a dense one, and how it is pruned."""

    dense: ResolvedModel
    config: PruneConfig
    plan: PrunePlan

    @property
    def model(self) -> str:
        """The dense model's name, without the folder it is in."""
        return Path(self.dense.asked).name

    @property
    def title(self) -> str:
        """What tables, plots and MLflow call it."""
        return title_of(self.dense, self.config)

    def folder(self, workspace: Workspace) -> RunFolder:
        """Where its files go: the folder that ``compress`` uses for the same model."""
        return _folder(PruneRequest(self.dense, self.config, self.plan), workspace)


@dataclass(frozen=True)
class Tried:
    """A point that was pruned and evaluated; its files are in ``folder``."""

    point: Point
    pruned: PrunedModel
    evaluation: EvalResult
    folder: RunFolder


def grid_of(models: list[ResolvedModel], grid: SweepConfig, prune: PruneConfig) -> list[Point]:
    """Every point of the grid, each planned: what cannot be pruned is found before any long work.

    Raises:
        ValueError: naming the point and what is missing, or the models whose names are the same.
    """
    names = [Path(dense.asked).name for dense in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        same = ", ".join(dense.asked for dense, name in zip(models, names, strict=True) if name in twice)
        raise ValueError(
            f"models holds {same}, which tables would call the same; give their folders names of their own"
        )
    points = []
    for dense in models:
        for schedule in grid.schedules:
            for ratio in grid.ratios:
                config = dataclasses.replace(prune, ratio=ratio, schedule=schedule)
                try:
                    points.append(Point(dense, config, plan_pruning(dense.folder, config)))
                except ValueError as error:
                    raise ValueError(f"{title_of(dense, config)}: {error}") from None
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
        "perplexity": "no perplexity is asked of the evaluation" if evaluation.perplexity == "none" else "",
        "accuracy": "" if evaluation.tasks else "no task is asked of the evaluation",
    }
    limits = {"speed": "min_speedup", "perplexity": "max_perplexity_ratio", "accuracy": "min_accuracy_retention"}
    for figure, setting in limits.items():
        if why[figure] and getattr(grid, setting):
            raise ValueError(f"{setting} is {getattr(grid, setting):g}, and {why[figure]}; set {setting} to 0")
        if why[figure] and grid.prefer == figure:
            raise ValueError(f"prefer is {figure!r}, and {why[figure]}; prefer size")


def runner_of(grid: SweepConfig) -> TaskRunner[Any]:
    """Prefect's task runner for the points.

    Raises:
        ValueError: when Dask is asked for and not installed.
    """
    if grid.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=grid.workers)
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise ValueError(
            "runner is 'dask', and prefect-dask is not installed; pip install 'slimgpt[team]', or use threads"
        ) from None
    if grid.dask_scheduler:
        return DaskTaskRunner(address=grid.dask_scheduler)
    # Dask would give each process one thread for its products. The number is among the facts a pruning is known by.
    threads = str(max(1, torch.get_num_threads() // grid.workers))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    processes = {"n_workers": grid.workers, "threads_per_worker": 1, "processes": True}
    return DaskTaskRunner(cluster_kwargs={**processes, "env": environment})


@contextmanager
def own_environment() -> Iterator[None]:
    """Put this process's variables back in the end: Dask leaves one thread for products there, also for vLLM later."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for variable in os.environ.keys() - before.keys():
            del os.environ[variable]
        os.environ.update(before)


@task(name="try", task_run_name="try {point.title}", cache_policy=NO_CACHE, persist_result=False)
def try_point(point: Point, evaluation: EvalConfig, data: tuple[DataUsed, ...], workspace: Workspace) -> Tried:
    """Prune, or find what an earlier run pruned, and evaluate."""
    # Planned once more: where this runs may be another device than where the sweep was checked.
    wanted = PruneRequest(point.dense, point.config, plan_pruning(point.dense.folder, point.config))
    folder = _folder(wanted, workspace)
    get_run_logger().info("%s: %s", point.title, folder.root)
    pruned = prune_model(wanted, folder)
    measured = EvalRequest("pruned", pruned.folder, pruned.digest, evaluation, data)
    return Tried(point, pruned, evaluate_model(measured, folder), folder)


@task(name="try dense", task_run_name="try {dense.asked}", cache_policy=NO_CACHE, persist_result=False)
def try_dense(
    dense: ResolvedModel, evaluation: EvalConfig, data: tuple[DataUsed, ...], workspace: Workspace
) -> EvalResult:
    """The dense model's own figures, which every pruned one's are compared with."""
    folder = workspace.run(Path(dense.asked).name, {"dense": dense.digest})
    return evaluate_model(EvalRequest("dense", dense.folder, dense.digest, evaluation, data), folder)


def title_of(dense: ResolvedModel, config: PruneConfig) -> str:
    """What tables, plots and MLflow call a model that is pruned so."""
    return f"{Path(dense.asked).name} {100 * config.ratio:g}% {config.schedule}"


def _folder(wanted: PruneRequest, workspace: Workspace) -> RunFolder:
    return workspace.run(default_name(wanted.dense.asked), wanted.facts)
