"""Prune, or find what an earlier run pruned. A run that was cut short is never retried blindly: the engine goes on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import torch
from prefect import get_run_logger, runtime, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext
from prefect.exceptions import TerminationSignal

from slimgpt.config import PruneConfig
from slimgpt.device import device_name
from slimgpt.engine.plan import PrunePlan
from slimgpt.engine.pruner import prune
from slimgpt.report import LayerReport, PruneReport, load_report
from tasks.digests import code_digest, facts_digest, folder_digest
from tasks.environment import RunFolder
from tasks.preflight.models import ResolvedModel
from tasks.registry.live_run import LiveRun


@dataclass(frozen=True)
class PruneRequest:
    """What is to be pruned, and how."""

    dense: ResolvedModel
    config: PruneConfig
    plan: PrunePlan

    @cached_property
    def facts(self) -> dict[str, object]:
        """All that the result depends on, bit for bit: the same facts, the same folder, the same files in it."""
        device = torch.device(self.plan.device)
        return {
            "model": self.dense.digest,
            "calibration": self.plan.calibration["ids_sha256"],
            "config": self.config.fingerprint(),
            "device": device_name(device),
            "dtype": self.plan.dtype,
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "torch": torch.__version__,
            "code": code_digest(),
        }


@dataclass(frozen=True)
class PrunedModel:
    """The pruned checkpoint, what pruning did to it, and the sha256 over its files."""

    folder: Path
    report: PruneReport
    digest: str


def prune_model(wanted: PruneRequest, folder: RunFolder, run: LiveRun | None = None) -> PrunedModel:
    """The pruned model: an earlier run's, where its files are still as they were written, else a new one.

    Each layer's figures go to the MLflow ``run`` as it ends; those of an earlier run when it is found.
    """
    logger, made = get_run_logger(), _prune(wanted, folder, run)
    if made["flow_run"] != runtime.flow_run.id:
        if folder.model.is_dir() and folder_digest(folder.model) == made["digest"]:
            logger.info("nothing is pruned again: flow run %s made the same model, and it is intact", made["flow_run"])
        else:
            logger.warning("the model that flow run %s pruned is damaged: made again", made["flow_run"])
            made = _prune.with_options(refresh_cache=True)(wanted, folder, run)
    report = load_report(folder.model)
    if run is not None:
        run.log_pruning(report)
    return PrunedModel(folder.model, report, made["digest"])


class _Progress:
    """The progress artifact, as long as Prefect responds: hours of pruning must not end for want of a picture."""

    def __init__(self, logger: Any) -> None:
        self._logger, self._shown = logger, True
        self._artifact = create_progress_artifact(0.0, key="compress-pruning", description="Pruned decoder layers")

    def show(self, percent: float) -> None:
        if not self._shown:
            return
        try:
            update_progress_artifact(self._artifact, percent)  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            self._shown = False  # each try takes Prefect's client a minute
            self._logger.warning("Prefect does not answer (%s): pruning goes on, its progress is not shown", error)


def _key(_: TaskRunContext, given: dict[str, Any]) -> str:
    return facts_digest({**given["wanted"].facts, "folder": str(given["folder"].model)})


@task(name="prune", tags=["gpu"], cache_key_fn=_key, persist_result=True, result_serializer="json")
def _prune(wanted: PruneRequest, folder: RunFolder, run: LiveRun | None) -> dict[str, str]:
    """Prune layer by layer, with a progress artifact. Returns the flow run that made it, and its digest."""
    logger = get_run_logger()
    progress = _Progress(logger)

    def on_layer(layer: LayerReport, layers: int) -> None:
        progress.show(100 * (layer.layer + 1) / layers)
        if run is not None:
            run.log_layer(layer)
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
    try:
        report = prune(
            wanted.dense.folder, folder.model, wanted.config, calibration=wanted.plan.tokens, on_layer=on_layer
        )
    except (KeyboardInterrupt, TerminationSignal):
        logger.warning("interrupted; finished layers are kept: run the same command again to go on")
        raise
    progress.show(100.0)
    if report.replayed_layers:
        logger.info("%d layers were kept from a run that was cut short", report.replayed_layers)
    logger.info(
        "pruned: ratio %.4f, %.0f s, peak memory %.2f GB", report.ratio, report.seconds, report.peak_memory_bytes / 1e9
    )
    return {"flow_run": str(runtime.flow_run.id), "digest": folder_digest(folder.model)}
