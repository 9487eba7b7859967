"""Prune, or find what an earlier run pruned. A run that was cut short is never retried blindly: the engine goes on."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from prefect import get_run_logger, runtime, task
from prefect.exceptions import TerminationSignal

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.config import PruneConfig
from slimgpt.engine.plan import PrunePlan, plan
from slimgpt.engine.pruner import prune
from slimgpt.equal_bits import conditions
from slimgpt.method.latency import LatencyTable
from slimgpt.report import LayerReport
from tasks.digests import files_digest
from tasks.preflight.chain import Expected, Watch
from tasks.preflight.planning import plan_pruning
from tasks.steps.making import facts_and_folder, make
from tasks.steps.progress import Progress


def prune_stages(config: PruneConfig, first_ratios: tuple[float, ...] = ()) -> list["PruneStage"]:
    """One pruning, or several that lead to ``config.ratio`` by way of ``first_ratios``.

    Raises:
        ValueError: when the ratios do not rise, or layer ratios are given, which are those of one pruning.
    """
    if config.target and first_ratios:
        raise ValueError(
            f"{config.target[0]} and first_ratios are given; several steps lead to a ratio: give it, or leave them out"
        )
    ratios = (*first_ratios, config.ratio)
    if any(later <= earlier for earlier, later in zip((0.0, *ratios), ratios, strict=False)) and first_ratios:
        raise ValueError(
            f"first_ratios is {', '.join(f'{ratio:g}' for ratio in first_ratios)} and ratio is {config.ratio:g}; each "
            "is a share of the dense model's parameters, so they must rise, from more than 0"
        )
    if first_ratios and config.schedule == "explicit":
        raise ValueError(
            "schedule is 'explicit' and first_ratios is given; layer_ratios are those of one pruning: leave one out"
        )
    return [PruneStage(replace(config, ratio=ratio)) for ratio in ratios]


@dataclass(frozen=True)
class PruneStage:
    """Prune.

    Args:
        config: ``ratio`` counts from the chain's first model on, whatever the stages before have removed.
        latency: what heads and channels take in an engine, for a target in speed.
    """

    config: PruneConfig
    latency: LatencyTable | None = None

    def plan(self, model: Expected) -> "PlannedPruning":
        """Widths, memory and the calibration's tokens.

        Raises:
            ValueError: one line that names all that is missing.
        """
        config = _further(self.config, model.ratio)
        planned = plan_pruning(model.first.folder, config, model.tokens, model.shapes, self.latency)
        return PlannedPruning(self.config, planned, model, self.latency)


@dataclass(frozen=True)
class PlannedPruning:
    """A pruning that can begin when its source is there."""

    config: PruneConfig
    plan: PrunePlan
    before: Expected
    latency: LatencyTable | None = None

    name = "prune"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All that the result depends on, bit for bit, besides the model."""
        device = torch.device(self.plan.device)
        return {
            "calibration": self.plan.calibration["ids_sha256"],
            "config": replace(self.config, dtype=cast(Any, self.plan.dtype)).fingerprint(),
            "dtype": self.plan.dtype,
            **conditions(device),
            **({"latency": self.latency.digest()} if self.latency else {}),
        }

    @property
    def bytes_after(self) -> int:
        """Expected size of the weight files."""
        return self.plan.bytes_after

    @property
    def disk_bytes(self) -> int:
        """That pruning needs in its folder."""
        return self.plan.disk_bytes

    @property
    def memory_bytes(self) -> int:
        """Estimated peak."""
        return self.plan.memory_bytes

    @property
    def seconds(self) -> float:
        """Estimated, from the rate of products on this device just now."""
        before, config = self.before, _further(self.config, self.before.ratio)
        folder, tokens = before.first.folder, self.plan.tokens
        again = plan(folder, config, calibration=tokens, shapes=before.shapes, latency=self.latency)
        return again.seconds or 0.0

    @property
    def after(self) -> Expected:
        """The model with the planned widths."""
        ratio = 1 - (1 - self.before.ratio) * (1 - self.plan.ratio)
        return replace(
            self.before, size=self.bytes_after, shapes=self.plan.shapes, ratio=ratio, tokens=self.plan.tokens
        )

    def run(self, source: Checkpoint, out: Path, facts: dict[str, Any], watch: Watch | None = None) -> Checkpoint:
        """The pruned model: an earlier run's, where its files are still as they were written, else a new one."""
        return make(_prune, self, source, out, facts, watch)

    def config_for(self, source: Checkpoint) -> PruneConfig:
        """The config with the ratio that is left to remove: what the stages before reached is known by now."""
        first = self.before.first.digest
        return _further(self.config, 0.0 if source.digest == first else source.lineage.since(first).ratio)


def _further(config: PruneConfig, gone: float) -> PruneConfig:
    """The config with the ratio of what is left, where ``gone`` of the first model is removed already."""
    return replace(config, ratio=max(0.0, round(1 - (1 - config.ratio) / (1 - gone), 6))) if gone else config


@task(name="prune", tags=["gpu"], cache_key_fn=facts_and_folder, persist_result=True, result_serializer="json")
def _prune(
    planned: PlannedPruning,
    source: Checkpoint,
    out: Path,
    facts: dict[str, Any],  # noqa: ARG001  the cache key
    watch: Watch | None,
) -> dict[str, str]:
    """Prune layer by layer, with a progress artifact. Returns the flow run that made it, and its digest."""
    logger = get_run_logger()
    progress = Progress("compress-pruning", "Pruned decoder layers")

    def finished(layer: LayerReport, layers: int) -> None:
        progress.show(100 * (layer.layer + 1) / layers)
        if watch is not None:
            watch.layer(layer)
        logger.info(
            "layer %d of %d: %d heads, FFN %d, errors %.4f and %.4f, %.1f s",
            layer.layer + 1,
            layers,
            layer.num_attention_heads,
            layer.intermediate_size,
            layer.attention_error,
            layer.ffn_error,
            layer.seconds,
        )

    def priced(done: int, layers: int) -> None:
        logger.info("prices of %d of %d layers, last to first", done, layers)

    out.parent.mkdir(parents=True, exist_ok=True)
    config, tokens = planned.config_for(source), planned.plan.tokens
    try:
        report = prune(
            source.folder,
            out,
            config,
            calibration=tokens,
            latency=planned.latency,
            on_layer=finished,
            on_priced=priced,
        )
    except (KeyboardInterrupt, TerminationSignal):
        logger.warning("interrupted; finished layers are kept: run the same command again to resume")
        raise
    progress.show(100.0)
    if report.replayed_layers:
        logger.info("%d layers were kept from a run that was cut short", report.replayed_layers)
    logger.info(
        "pruned: ratio %.4f, %.0f s, peak memory %.2f GB", report.ratio, report.seconds, report.peak_memory_bytes / 1e9
    )
    return {"flow_run": str(runtime.flow_run.id), "digest": files_digest(out)}
