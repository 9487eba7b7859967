"""Prune. The engine resumes from its own journal: this task is never retried blindly, it is run again and goes on."""

from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from slimgpt.config import PruneConfig
from slimgpt.pruner import prune
from slimgpt.report import LayerReport, PruneReport
from tasks.environment import RunFolder


@dataclass(frozen=True)
class PrunedModel:
    """The pruned checkpoint and what pruning did to it."""

    folder: Path
    report: PruneReport


@task(name="prune", cache_policy=NO_CACHE, persist_result=False)
def prune_model(model: Path, config: PruneConfig, folder: RunFolder) -> PrunedModel:
    """Prune layer by layer; the progress artifact moves once per layer."""
    logger = get_run_logger()
    progress = create_progress_artifact(0.0, key="compress-pruning", description="Pruned decoder layers")

    def on_layer(layer: LayerReport, layers: int) -> None:
        update_progress_artifact(progress, 100 * (layer.layer + 1) / layers)  # type: ignore[arg-type]
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

    folder.model.parent.mkdir(parents=True, exist_ok=True)
    report = prune(model, folder.model, config, on_layer=on_layer)
    update_progress_artifact(progress, 100.0)  # type: ignore[arg-type]
    logger.info(
        "pruned: ratio %.4f, %.0f s, peak memory %.2f GB", report.ratio, report.seconds, report.peak_memory_bytes / 1e9
    )
    return PrunedModel(folder.model, report)
