"""Evaluate one model. Dense and pruned are measured by the same config on the same machine, one after the other."""

import json
import logging
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from slimgpt.config import EvalConfig
from slimgpt.files import write_atomically
from slimgpt.harness import EvalResult, evaluate
from tasks.environment import RunFolder


@task(name="evaluate", task_run_name="evaluate {side}", tags=["gpu"], cache_policy=NO_CACHE, persist_result=False)
def evaluate_model(side: str, model: Path, config: EvalConfig, folder: RunFolder) -> EvalResult:
    """Perplexity and tasks of the ``side`` ("dense" or "pruned") model; the figures also go to evaluation-SIDE.json."""
    logger = get_run_logger()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant: an object instead of a name
    result = evaluate(model, config, on_progress=lambda line: logger.info("%s: %s", side, line))
    keep_evaluation(side, result, folder)
    logger.info(
        "%s: %s",
        side,
        ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items() if "stderr" not in name),
    )
    return result


def keep_evaluation(side: str, result: EvalResult, folder: RunFolder) -> None:
    """Write evaluation-SIDE.json, whole or not at all."""
    folder.root.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.root / f"evaluation-{side}.json", json.dumps(result.to_dict(), indent=2) + "\n")
