"""The same five prompts, answered before and after: for people, beside the figures."""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from slimgpt.data.bos import lost_bos
from slimgpt.data.calibration import load_tokenizer

PROMPTS = (
    "The three largest cities of France are",
    "Photosynthesis is the process by which",
    "To make a good cup of tea, first",
    "def is_prime(n):",
    "Question: A train travels 60 miles in one and a half hours. What is its average speed?\nAnswer:",
)
NEW_TOKENS = 24


def answer(model: Any, folder: Path) -> list[str]:
    """What a model says to each of ``PROMPTS``, token by token the most probable one.

    Args:
        model: a causal language model of transformers.
        folder: with its tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    start = lost_bos(tokenizer, model.config.model_type)
    prompts = [tokenizer(start + prompt)["input_ids"] for prompt in PROMPTS]
    longest, end = max(map(len, prompts)), tokenizer.eos_token_id
    ids_BT = torch.tensor([[end or 0] * (longest - len(ids)) + ids for ids in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=end, pad_token_id=end or 0)
    was_training = model.training
    with torch.no_grad():
        said_BT = model.eval().generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=greedy)
    model.train(was_training)
    return [tokenizer.decode(said_T[longest:], skip_special_tokens=True) for said_T in said_BT]
