"""Evaluate one model, or find what an earlier run measured: of the same bytes, on the same data and machine."""

import json
import logging
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from prefect import get_run_logger, runtime, task
from prefect.context import TaskRunContext

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.config import EvalConfig
from slimgpt.device import resolve_device
from slimgpt.equal_bits import conditions
from slimgpt.evaluation.harness import EvalResult, evaluate
from slimgpt.evaluation.harness_tasks import DataUsed
from slimgpt.files import write_atomically
from tasks.digests import facts_digest, folder_digest
from tasks.environment import RunFolder
from tasks.preflight.models import settled
from tasks.registry.live_run import LiveRun


@dataclass(frozen=True)
class EvalRequest:
    """A model and what is measured of it.

    Args:
        side: "dense" or "pruned".
        model: its checkpoint.
        config: what is measured.
        data: what that takes, as the preflight found it.
    """

    side: str
    model: Checkpoint
    config: EvalConfig
    data: tuple[DataUsed, ...]

    @property
    def facts(self) -> dict[str, object] | None:
        """All that the figures depend on; None where data comes from the hub, which names no digest of it."""
        if not all(data.sha256 for data in self.data):
            return None
        return {
            "model": [self.model.folder.name, folder_digest(self.model.folder)],
            "config": asdict(settled(self.config, self.model.folder)),
            "data": [data.to_dict() for data in self.data],
            "lm_eval": version("lm_eval") if self.config.tasks else "",
            **conditions(resolve_device(self.config.device)),
        }


def evaluate_model(wanted: EvalRequest, folder: RunFolder, run: LiveRun | None = None) -> EvalResult:
    """Perplexity and tasks of one model; the figures also go to evaluation-SIDE.json and to the MLflow ``run``."""
    logger, made = get_run_logger(), _evaluate(wanted)
    result = replace(EvalResult.from_dict(made["result"]), digest=wanted.model.digest)
    if made["flow_run"] != str(runtime.flow_run.id):
        logger.info("%s: nothing is measured again: flow run %s measured the same", wanted.side, made["flow_run"])
    keep_evaluation(wanted.side, result, folder)
    if run is not None:
        run.log_evaluation(wanted.side, result)
    logger.info(
        "%s: %s",
        wanted.side,
        ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items() if "stderr" not in name),
    )
    return result


def _key(_: TaskRunContext, given: dict[str, Any]) -> str | None:
    facts = given["wanted"].facts
    return facts_digest(facts) if facts else None


@task(
    name="evaluate",
    task_run_name="evaluate {wanted.side}",
    tags=["gpu"],
    cache_key_fn=_key,
    persist_result=True,
    result_serializer="json",
)
def _evaluate(wanted: EvalRequest) -> dict[str, Any]:
    """Measure; returns the flow run that did, and the figures."""
    logger, side = get_run_logger(), wanted.side
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant: an object instead of a name
    result = evaluate(wanted.model.folder, wanted.config, on_progress=lambda line: logger.info("%s: %s", side, line))
    return {"flow_run": str(runtime.flow_run.id), "result": result.to_dict()}


def keep_evaluation(side: str, result: EvalResult, folder: RunFolder) -> None:
    """Write evaluation-SIDE.json, complete or not at all."""
    folder.root.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.root / f"evaluation-{side}.json", json.dumps(result.to_dict(), indent=2) + "\n")
