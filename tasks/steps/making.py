"""Make a checkpoint once: a run that asks for the same finds what an earlier one made, while it is intact."""

import shutil
from pathlib import Path
from typing import Any

from prefect import Task, get_run_logger, runtime
from prefect.context import TaskRunContext

from slimgpt.checkpoints.headers import CONFIG
from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.engine.journal import JOURNAL
from slimgpt.files import write_atomically
from tasks.digests import facts_digest, files_digest
from tasks.preflight.chain import PlannedStage, Watch

MADE = ".made.sha256"  # in a checkpoint: the digest of its files as they were written; hidden files are not copied


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
        task: of these arguments (but for itself); returns the ``flow_run`` that made it, and the files' ``digest``.
        stage: its config.
        source: the checkpoint that it reads.
        out: where the result goes.
        facts: all that the result depends on.
        watch: is told of the work.
    """
    logger, anew = get_run_logger(), task.with_options(refresh_cache=True)
    if is_damaged(out):
        logger.warning("%s: the model in %s is damaged: made again", stage.name, out)
        _make_way(out)
        made = anew(stage, source, out, facts, watch)
    else:
        made = task(stage, source, out, facts, watch)
    if made["flow_run"] != runtime.flow_run.id:
        if out.is_dir() and files_digest(out) == made["digest"]:
            logger.info(
                "%s: nothing is made again: flow run %s made the same model, and it is intact",
                stage.name,
                made["flow_run"],
            )
        else:
            logger.warning(
                "%s: the model that flow run %s made is gone or damaged: made again", stage.name, made["flow_run"]
            )
            made = anew(stage, source, out, facts, watch)
    if _recorded(out) != made["digest"]:
        write_atomically(out / MADE, made["digest"])
    return Checkpoint.open(out)


def is_intact(out: Path) -> bool:
    """Whether every file of the checkpoint is as it was written."""
    return bool(digest := _recorded(out)) and files_digest(out) == digest


def is_damaged(out: Path) -> bool:
    """Whether a file of the checkpoint was changed or lost; False where it was never finished."""
    return bool(digest := _recorded(out)) and files_digest(out) != digest


def _recorded(out: Path) -> str:
    return (out / MADE).read_text() if (out / MADE).is_file() else ""


def _make_way(out: Path) -> None:
    """Let the stage write ``out`` again: it takes a folder with config.json for a finished model."""
    (out / CONFIG).unlink(missing_ok=True)
    if (out / JOURNAL).is_file():  # intact layers are kept
        (out / MADE).unlink()
    else:
        shutil.rmtree(out)
