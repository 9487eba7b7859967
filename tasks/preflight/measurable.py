"""Check that what is to be measured can be measured of this model."""

from dataclasses import replace
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from deploy.bench.config import BenchConfig, check_model, longest_of
from deploy.bench.dataset import check_dataset
from deploy.engines.availability import model_obstacle
from slimgpt.checkpoints.origins import read_config
from slimgpt.config import EvalConfig
from slimgpt.data.bos import resolve_bos
from slimgpt.data.calibration import load_tokenizer
from slimgpt.data.text import perplexity_text
from slimgpt.evaluation.harness import check_chat_template
from slimgpt.evaluation.perplexity import check_length, check_text
from tasks.preflight.request import Preflight


def _check_evaluation(model: Path, evaluation: EvalConfig) -> None:
    tokenizer = load_tokenizer(model)
    config = read_config(model)
    bos = resolve_bos(evaluation.bos, tokenizer, config.model_type)
    if evaluation.tasks and evaluation.apply_chat_template:
        check_chat_template(tokenizer, model)
    if evaluation.perplexity != "none":
        try:
            check_length(evaluation.seq_len, config)
            check_text(perplexity_text(evaluation.perplexity), tokenizer, evaluation.seq_len, bos)
        except ValueError as error:
            raise ValueError(f"evaluation: {error} (evaluation.seq_len)") from None


@task(name="check what is measured", cache_policy=NO_CACHE, persist_result=False)
def check_measurable(model: Path, evaluation: EvalConfig, bench: BenchConfig, ready: Preflight) -> Preflight:
    """Refuse sequences that are too long for the model, and a text that is too short for one of them.

    Pruning changes neither, so this is known before it. A model that vLLM is known not to serve here is an obstacle to
    the serving steps alone: returns ``ready`` with it.

    Raises:
        ValueError: one line with the section, both lengths and the remedy.
    """
    if "evaluate" not in ready.skip:
        _check_evaluation(model, evaluation)
    if ready.serving_obstacle:
        return ready
    if obstacle := model_obstacle(model):
        get_run_logger().warning("serving steps will be skipped: %s", obstacle)
        return replace(ready, serving_obstacle=obstacle)
    try:
        check_model(model, bench)
        check_dataset(model, bench, longest_of(model))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"bench: {error}") from None
    return ready
