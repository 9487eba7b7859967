"""Text to token blocks ``[N, T]``: deterministic, fingerprinted, without padding (which would enter the statistics)."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .text import TextSource, calibration_text


@dataclass(frozen=True)
class Calibration:
    """What is looked at.

    Attributes:
        ids_NT: token ids ``[num_samples, seq_len]``.
        facts: name and sha256 of the text, counts, seed, and the sha256 of the ids.
    """

    ids_NT: Tensor
    facts: dict[str, Any]


def token_blocks(tokenizer: Any, text: TextSource, *, num_samples: int, seq_len: int, seed: int) -> Calibration:
    """Draw ``num_samples`` blocks of ``seq_len`` tokens: documents in random order, joined by EOS, cut without overlap.

    Args:
        tokenizer: of transformers.
        text: documents.
        num_samples: blocks wanted.
        seq_len: tokens in a block.
        seed: of the order of documents.

    Raises:
        ValueError: when the text has fewer tokens than asked for.
    """
    order = list(range(len(text.documents)))
    random.Random(seed).shuffle(order)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    wanted = num_samples * seq_len
    ids: list[int] = []
    for start in range(0, len(order), 64):  # in batches: tokenizers run them in parallel
        batch = [text.documents[i] for i in order[start : start + 64]]
        for document in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids += document + end
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise ValueError(
            f"{text.name} has {len(ids)} tokens; {num_samples} samples of {seq_len} need {wanted}: "
            f"ask for at most {len(ids) // seq_len} samples, or name a larger text"
        )
    ids_NT = torch.tensor(ids[:wanted], dtype=torch.long).view(num_samples, seq_len)
    facts = {
        "name": text.name,
        "origin": text.origin,
        "sha256": text.sha256,
        "num_samples": num_samples,
        "seq_len": seq_len,
        "tokens": wanted,
        "seed": seed,
        "ids_sha256": hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest(),
    }
    return Calibration(ids_NT, facts)


def calibrate(model: Path, source: str, *, num_samples: int, seq_len: int, seed: int) -> Calibration:
    """The token blocks of ``source`` for the model in folder ``model``.

    Raises:
        ValueError: when the source is empty or too short.
        FileNotFoundError: when it does not exist.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return token_blocks(tokenizer, calibration_text(source), num_samples=num_samples, seq_len=seq_len, seed=seed)
