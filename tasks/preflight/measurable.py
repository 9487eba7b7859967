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
from slimgpt.evaluation.harness import check_for_tasks
from slimgpt.evaluation.perplexity import check_length, text_blocks
from tasks.preflight.request import Preflight


def _check_evaluation(model: Path, evaluation: EvalConfig) -> None:
    config = read_config(model)
    tokenizer = load_tokenizer(model)
    bos = resolve_bos(evaluation.bos, tokenizer, config.model_type)
    if evaluation.tasks:
        check_for_tasks(tokenizer, model, chat_template=evaluation.apply_chat_template)
    if evaluation.perplexity != "none":
        try:
            check_length(evaluation.seq_len, config)
            text_blocks(
                perplexity_text(evaluation.perplexity),
                tokenizer,
                config.vocab_size,
                seq_len=evaluation.seq_len,
                max_blocks=evaluation.max_blocks or None,
                bos=bos,
            )
        except ValueError as error:
            setting = " (evaluation.seq_len)" if "lower seq_len" in str(error) else ""
            raise ValueError(f"evaluation: {error}{setting}") from None


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
