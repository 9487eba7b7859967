"""Quantise a pruned model, or find what an earlier run made of it."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect import get_run_logger, runtime, task

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.config import QuantizeConfig
from slimgpt.data.calibration import Calibration
from slimgpt.quantization.job import QuantizationJob
from slimgpt.quantization.packages import missing_packages
from slimgpt.quantization.quantizer import quantize
from tasks.digests import files_digest
from tasks.preflight.chain import Expected, Watch
from tasks.steps.making import facts_and_folder, make
from tasks.steps.progress import Progress


@dataclass(frozen=True)
class QuantizeStage:
    """Store the weights in fewer bits; the last stage of a chain, since nothing prunes or trains what it leaves."""

    config: QuantizeConfig

    def plan(self, model: Expected) -> "PlannedQuantization":
        """Group size, text and packages.

        Raises:
            ValueError, FileNotFoundError: one line with what is wrong and the remedy.
        """
        if missing := missing_packages():
            raise ValueError(missing)
        job = QuantizationJob(model.first.folder, self.config, model.shapes)
        tokens = job.calibration()
        get_run_logger().info("quantisation: %s%s", job.format, f" ({job.remark})" if job.remark else "")
        return PlannedQuantization(self.config, job, tokens, model)


@dataclass(frozen=True)
class PlannedQuantization:
    """A quantisation that can begin when its source is there."""

    config: QuantizeConfig
    job: QuantizationJob
    tokens: Calibration | None
    before: Expected

    name = "quantize"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that the result depends on, bit for bit, besides the model."""
        return self.job.facts(self.tokens)

    @property
    def bytes_after(self) -> int:
        """Expected size of the weight files."""
        return self.job.bytes_after(self.before.size)

    @property
    def disk_bytes(self) -> int:
        """That the stage needs in its folder."""
        return self.job.disk_bytes(self.before.size)

    @property
    def memory_bytes(self) -> int:
        """Estimated peak."""
        return self.job.memory_bytes(self.before.size)

    @property
    def seconds(self) -> float:
        """Estimated, for two CPU cores."""
        return self.job.seconds

    @property
    def after(self) -> Expected:
        """The model with the widths that it had."""
        return replace(self.before, size=self.bytes_after)

    def run(self, source: Checkpoint, out: Path, facts: dict[str, Any], watch: Watch | None = None) -> Checkpoint:
        """The quantised model: an earlier run's, where its files are still as they were written, else a new one."""
        return make(_quantize, self, source, out, facts, watch)


@task(name="quantize", tags=["gpu"], cache_key_fn=facts_and_folder, persist_result=True, result_serializer="json")
def _quantize(
    planned: PlannedQuantization,
    source: Checkpoint,
    out: Path,
    facts: dict[str, Any],  # noqa: ARG001  the cache key
    watch: Watch | None,  # noqa: ARG001  it takes figures of layers and steps, of which there are none
) -> dict[str, str]:
    """Quantise, with a progress artifact. Returns the flow run that made it, and its digest."""
    logger, progress = get_run_logger(), Progress("compress-quantization", "Quantised decoder layers")

    def on_layer(done: int, layers: int) -> None:
        progress.show(100 * done / layers)
        logger.info("layer %d of %d is quantised", done, layers)

    out.parent.mkdir(parents=True, exist_ok=True)
    made = quantize(source.folder, out, planned.config, tokens=planned.tokens, on_layer=on_layer)
    progress.show(100.0)
    logger.info("quantised: %s", made.lineage.steps[-1].summary)
    return {"flow_run": str(runtime.flow_run.id), "digest": files_digest(out)}
