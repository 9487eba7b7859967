"""The points of a sweep: each is pruned and evaluated, on threads or on Dask's workers."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from slimgpt.config import EvalConfig
from slimgpt.evaluation.harness import EvalResult
from slimgpt.evaluation.harness_tasks import DataUsed
from tasks.digests import folder_digest
from tasks.environment import Workspace
from tasks.preflight.chain import plan_chain
from tasks.preflight.models import ResolvedModel
from tasks.registry.live_run import LiveRun
from tasks.steps.chain import run_chain
from tasks.steps.evaluation import EvalRequest, evaluate_model
from tasks.sweep.points import Point, Tried, folder_of


@task(name="try", task_run_name="try {point.title}", cache_policy=NO_CACHE, persist_result=False)
def try_point(
    point: Point, evaluation: EvalConfig, data: tuple[DataUsed, ...], workspace: Workspace, run: LiveRun
) -> Tried:
    """Prune, or find what an earlier run pruned, and evaluate. ``run`` stays open for the figures that follow."""
    # Planned again here: Dask's worker may run where the GPU is.
    chain = plan_chain(point.dense, point.stages, point.chain.stages[-1].after.tokens)
    folder = folder_of(chain, workspace)
    get_run_logger().info("%s: %s", point.title, folder.root)
    with run.working():
        pruned = run_chain(chain, folder, run=run)
        measured = EvalRequest("pruned", pruned, evaluation, data)
        return Tried(point, pruned, evaluate_model(measured, folder, run), folder, run)


@task(name="try dense", task_run_name="try {dense.name}", cache_policy=NO_CACHE, persist_result=False)
def try_dense(
    dense: ResolvedModel, evaluation: EvalConfig, data: tuple[DataUsed, ...], workspace: Workspace
) -> EvalResult:
    """The dense model's own figures, which every pruned one's are compared with."""
    folder = workspace.run(dense.label, {"dense": folder_digest(dense.folder)})
    return evaluate_model(EvalRequest("dense", dense.checkpoint, evaluation, data), folder)
