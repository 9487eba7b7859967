"""What heads and channels take in vLLM here, for a pruning whose target is a speed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from deploy.bench.config import BenchConfig
from deploy.bench.latency import known_latency, measure_latency
from slimgpt.checkpoints.families import layer_shapes
from slimgpt.checkpoints.origins import read_config
from slimgpt.method.latency import LatencyTable
from tasks.preflight.chain import Stage, plan_chain
from tasks.preflight.models import ResolvedModel
from tasks.steps.pruning import PruneStage
from tasks.steps.quantization import QuantizeStage


def timed(stages: Sequence[Stage], dense: ResolvedModel, bench: BenchConfig, *, measure: bool = True) -> list[Stage]:
    """The stages, those with a target in speed with the milliseconds that it spends.

    Args:
        stages: of a chain.
        dense: the model that it begins with.
        bench: the requests.
        measure: where they are not known; else such a stage is left without them, and refuses to be planned.

    Raises:
        ValueError: before anything is measured: what is missing for any stage, or for vLLM.
        ServerError: an engine did not do the work.
    """
    asked = [stage for stage in stages if isinstance(stage, PruneStage) and stage.config.target_speedup]
    if not asked:
        return list(stages)
    hidden_size = layer_shapes(read_config(dense.folder))[0].hidden_size
    plan_chain(dense, [_whatever_the_widths(stage, hidden_size) for stage in stages])
    table = _measure(dense.folder, bench) if measure else known_latency(dense.folder, bench)
    return [replace(stage, latency=table) if stage in asked else stage for stage in stages]


def _whatever_the_widths(stage: Stage, hidden_size: int) -> Stage:
    """The stage without what can only be judged when the milliseconds, and with them the widths, are known."""
    if isinstance(stage, PruneStage):
        return replace(stage, config=replace(stage.config, target_speedup=0.0))
    if isinstance(stage, QuantizeStage) and hidden_size % max(1, stage.config.group_size) == 0:
        return replace(stage, config=replace(stage.config, group_size=0))
    return stage


@task(name="measure milliseconds", tags=["gpu"], cache_policy=NO_CACHE, persist_result=False)
def _measure(model: Path, bench: BenchConfig) -> LatencyTable:
    """From the cache, or measured now."""
    table = measure_latency(model, bench, get_run_logger().info)
    get_run_logger().info(
        "%.0f ms for the benchmark's requests, of which %.0f in the layers",
        table.total_ms,
        table.layers_us([table.shape] * table.layers) / 1000,
    )
    return table
