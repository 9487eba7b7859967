"""Check that the model reads what the evaluation and the benchmark will give it."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from transformers import AutoTokenizer

from deploy.bench.config import BenchConfig, check_model
from slimgpt.checkpoints.origins import read_config
from slimgpt.config import EvalConfig
from slimgpt.data.text import perplexity_text
from slimgpt.evaluation.perplexity import check_length, check_text
from tasks.preflight.request import Preflight


@task(name="check the lengths", cache_policy=NO_CACHE, persist_result=False)
def check_lengths(model: Path, evaluation: EvalConfig, bench: BenchConfig, ready: Preflight) -> None:
    """Refuse sequences that are too long for the model, and a text that is too short for one of them.

    Pruning changes neither, so this is known before it.

    Raises:
        ValueError: one line with the section, both lengths and the remedy.
    """
    if evaluation.perplexity != "none":
        try:
            check_length(evaluation.seq_len, read_config(model))
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            check_text(perplexity_text(evaluation.perplexity), tokenizer, evaluation.seq_len)
        except ValueError as error:
            raise ValueError(f"evaluation: {error} (evaluation.seq_len)") from None
    if not ready.serving_obstacle:
        try:
            check_model(model, bench)
        except ValueError as error:
            raise ValueError(f"bench: {error}") from None
