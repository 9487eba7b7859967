"""Make a checkpoint once: a run that asks for the same finds what an earlier one made, while it is intact."""

from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger, runtime
from prefect.context import TaskRunContext

from slimgpt.checkpoints.lineage import Checkpoint
from tasks.digests import facts_digest, folder_digest
from tasks.preflight.chain import PlannedStage, Watch


def facts_and_folder(_: TaskRunContext, given: dict[str, Any]) -> str:
    """The cache key of such a task: all that the result depends on, and where it goes."""
    return facts_digest({**given["facts"], "folder": str(given["out"])})


def make(
    task: Task[..., dict[str, str]],
    stage: PlannedStage,
    source: Checkpoint,
    out: Path,
    facts: dict[str, Any],
    watch: Watch | None,
) -> Checkpoint:
    """What ``task`` makes of ``source``: an earlier run's, where its files are still as they were written, or anew.

    Args:
        task: of these arguments (but for itself); returns the ``flow_run`` that made it, and the folder's ``digest``.
        stage: its config.
        source: the checkpoint that it reads.
        out: where the result goes.
        facts: all that the result depends on.
        watch: is told of the work.
    """
    logger, made = get_run_logger(), task(stage, source, out, facts, watch)
    if made["flow_run"] != runtime.flow_run.id:
        if out.is_dir() and folder_digest(out) == made["digest"]:
            logger.info(
                "%s: nothing is made again: flow run %s made the same model, and it is intact",
                stage.name,
                made["flow_run"],
            )
        else:
            logger.warning("%s: the model that flow run %s made is damaged: made again", stage.name, made["flow_run"])
            task.with_options(refresh_cache=True)(stage, source, out, facts, watch)
    return Checkpoint.open(out)
