"""Plan the pruning: what is missing for it stops the flow here."""

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from slimgpt.config import PruneConfig
from slimgpt.data.calibration import Calibration
from slimgpt.engine.plan import PrunePlan, plan
from slimgpt.method.latency import LatencyTable
from slimgpt.method.shapes import LayerShape
from slimgpt.quantities import in_millions


@task(name="plan the pruning", cache_policy=NO_CACHE, persist_result=False)
def plan_pruning(
    model: Path,
    config: PruneConfig,
    tokens: Calibration | None = None,
    shapes: list[LayerShape] | None = None,
    latency: LatencyTable | None = None,
) -> PrunePlan:
    """Widths, memory and the calibration's tokens before any weight is read; what is missing stops the flow here.

    Args:
        model: its folder.
        config: how it is pruned.
        tokens: calibration tokens that were made before, of this model and config.
        shapes: widths that the model will have by then; None for those it has.
        latency: what heads and channels take in an engine, for a target in speed.

    Raises:
        ValueError: one line that names all that is missing.
    """
    planned = plan(model, config, calibration=tokens, shapes=shapes, latency=latency, estimate_seconds=False)
    if planned.missing:
        raise ValueError("; ".join(planned.missing))
    get_run_logger().info(
        "%s M parameters become %s M; calibration: %s; about %.1f GB of memory",
        in_millions(planned.parameters_before),
        in_millions(planned.parameters_after),
        planned.calibration.get("name"),
        planned.memory_bytes / 1e9,
    )
    return planned
