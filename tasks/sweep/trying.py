"""The points of a sweep: each is pruned and evaluated, on threads or on Dask's workers."""

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from slimgpt.config import EvalConfig
from slimgpt.device import resolve_device
from slimgpt.evaluation.harness import EvalResult
from slimgpt.evaluation.harness_tasks import DataUsed
from tasks.environment import Workspace
from tasks.preflight.models import ResolvedModel
from tasks.preflight.planning import plan_pruning
from tasks.registry.live_run import LiveRun
from tasks.steps.evaluation import EvalRequest, evaluate_model
from tasks.steps.pruning import PruneRequest, prune_model
from tasks.sweep.points import Point, Tried, folder_of


@task(name="try", task_run_name="try {point.title}", cache_policy=NO_CACHE, persist_result=False)
def try_point(
    point: Point, evaluation: EvalConfig, data: tuple[DataUsed, ...], workspace: Workspace, run: LiveRun
) -> Tried:
    """Prune, or find what an earlier run pruned, and evaluate. ``run`` stays open for the figures that follow."""
    plan = point.plan
    if plan.device != str(resolve_device(point.config.device)):  # Dask's worker may run where the GPU is
        plan = plan_pruning(point.dense.folder, point.config, plan.tokens)
    wanted = PruneRequest(point.dense, point.config, plan)
    folder = folder_of(wanted, workspace)
    get_run_logger().info("%s: %s", point.title, folder.root)
    with run.working():
        pruned = prune_model(wanted, folder, run)
        measured = EvalRequest("pruned", pruned.folder, pruned.digest, evaluation, data)
        return Tried(point, pruned, evaluate_model(measured, folder, run), folder, run)


@task(name="try dense", task_run_name="try {dense.name}", cache_policy=NO_CACHE, persist_result=False)
def try_dense(
    dense: ResolvedModel, evaluation: EvalConfig, data: tuple[DataUsed, ...], workspace: Workspace
) -> EvalResult:
    """The dense model's own figures, which every pruned one's are compared with."""
    folder = workspace.run(Path(dense.name).name, {"dense": dense.digest})
    return evaluate_model(EvalRequest("dense", dense.folder, dense.digest, evaluation, data), folder)
