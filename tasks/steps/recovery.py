"""Train a pruned model again, or find what an earlier run trained."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect import get_run_logger, runtime, task
from prefect.exceptions import TerminationSignal

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.config import PruneConfig, RecoverConfig
from slimgpt.recovery import cost
from slimgpt.recovery.job import RecoveryJob
from slimgpt.recovery.recoverer import facts_of, recover
from slimgpt.recovery.text import RecoveryText, draw
from tasks.digests import files_digest
from tasks.preflight.chain import Expected, Stage, Watch
from tasks.steps.making import facts_and_folder, make
from tasks.steps.progress import Progress
from tasks.steps.pruning import prune_stages


def stages_of(
    prune: PruneConfig,
    recover: RecoverConfig,
    teacher: Path | None = None,
    first_ratios: tuple[float, ...] = (),
    rounds: int = 1,
) -> list[Stage]:
    """One pruning, or several, each followed by a training where ``recover`` has tokens.

    Args:
        prune: ``ratio`` is where the last pruning leads to.
        recover: how each pruned model is trained.
        teacher: folder of the model that is learned from; None for the first of the lineage.
        first_ratios: where the prunings before the last one lead to.
        rounds: how many prunings there are, where ``first_ratios`` are not given; they lead there in equal steps.

    Raises:
        ValueError: as ``prune_stages`` raises; where rounds are less than 1, or given beside ``first_ratios``.
    """
    if rounds < 1 or (rounds > 1 and first_ratios):
        raise ValueError(
            f"rounds is {rounds}"
            + (f" and first_ratios has {len(first_ratios)}; leave one out" if rounds > 1 else "; it must be at least 1")
        )
    if rounds > 1 and prune.target:
        raise ValueError(f"rounds is {rounds} and {prune.target[0]} is given; rounds lead to a ratio: give that")
    first_ratios = first_ratios or tuple(prune.ratio * i / rounds for i in range(1, rounds))
    stages: list[Stage] = []
    for stage in prune_stages(prune, first_ratios):
        stages += [stage, RecoverStage(recover, teacher)] if recover.tokens else [stage]
    return stages


@dataclass(frozen=True)
class RecoverStage:
    """Train again.

    Args:
        config: how.
        teacher: folder of the model that is learned from; None for the first of the lineage.
    """

    config: RecoverConfig
    teacher: Path | None = None

    def plan(self, model: Expected) -> "PlannedRecovery":
        """Teacher, device and text.

        Raises:
            ValueError, FileNotFoundError: one line with what is wrong and the remedy.
        """
        first = model.first
        teacher = self.teacher or (None if first.lineage.steps else first.folder)
        job = RecoveryJob(first.folder, self.config, teacher, model.shapes)
        text = draw(first.folder, job.config)
        get_run_logger().info(
            "recovery: %d steps on %d tokens of %s%s",
            text.steps,
            text.facts["tokens"],
            text.facts["name"],
            f", learned from {job.teacher_name}" if job.teacher is not None else "",
        )
        return PlannedRecovery(self.config, job, text, model)


@dataclass(frozen=True)
class PlannedRecovery:
    """A training that can begin when its source is there."""

    config: RecoverConfig
    job: RecoveryJob
    text: RecoveryText
    before: Expected

    name = "recover"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that the result depends on, bit for bit, besides the model."""
        return facts_of(self.job, self.text, processes=1)

    @property
    def bytes_after(self) -> int:
        """Expected size of the weight files."""
        return self.before.size

    @property
    def disk_bytes(self) -> int:
        """That training needs in its folder."""
        return self.job.disk_bytes

    @property
    def memory_bytes(self) -> int:
        """Estimated peak."""
        return cost.memory_bytes(self.job)

    @property
    def seconds(self) -> float:
        """Estimated, from the rate of products on this device just now."""
        return cost.seconds(self.job, self.text)

    @property
    def after(self) -> Expected:
        """The model with the widths that it had."""
        return replace(self.before)

    def run(self, source: Checkpoint, out: Path, facts: dict[str, Any], watch: Watch | None = None) -> Checkpoint:
        """The trained model: an earlier run's, where its files are still as they were written, else a new one."""
        return make(_recover, self, source, out, facts, watch)


@task(name="recover", tags=["gpu"], cache_key_fn=facts_and_folder, persist_result=True, result_serializer="json")
def _recover(
    planned: PlannedRecovery,
    source: Checkpoint,
    out: Path,
    facts: dict[str, Any],  # noqa: ARG001  the cache key
    watch: Watch | None,
) -> dict[str, str]:
    """Train, with a progress artifact. Returns the flow run that made it, and its digest."""
    logger, progress = get_run_logger(), Progress("compress-recovery", "Steps of the training")

    def on_step(step: int, steps: int, measured: dict[str, float]) -> None:
        progress.show(100 * step / steps)
        if watch is not None:
            watch.step(step, measured)
        if "eval_loss" in measured:
            logger.info("step %d of %d: loss of held-out text %.4f nats per token", step, steps, measured["eval_loss"])

    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        teacher = planned.job.teacher.folder if planned.job.teacher is not None else None
        made = recover(source.folder, out, planned.config, teacher=teacher, text=planned.text, on_step=on_step)
    except (KeyboardInterrupt, TerminationSignal):
        logger.warning("interrupted; the states of the training are kept: run the same command again to resume")
        raise
    progress.show(100.0)
    logger.info("recovered: %s", made.lineage.steps[-1].summary)
    return {"flow_run": str(runtime.flow_run.id), "digest": files_digest(out)}
