"""The sequences that a model is trained on, and those that are held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimgpt.config import RecoverConfig
from slimgpt.data.calibration import calibrate, together
from slimgpt.data.mixture import parts_of


@dataclass(frozen=True)
class RecoveryText:
    """Token ids ``[sequences, seq_len]``, and what the lineage says of the text."""

    train_NT: Tensor
    held_out_NT: Tensor
    facts: dict[str, Any]


def draw(model: Path, config: RecoverConfig) -> RecoveryText:
    """Draw the sequences for the model in folder ``model``: as many as are needed, or as the text has.

    Of each text the last sequences drawn are held out. The others come in random order, in whole steps.

    Raises:
        ValueError, FileNotFoundError: as ``calibrate`` raises; where the text is too short for one step.
    """
    wanted = config.steps * config.batch_size
    train, held_out, parts = [], [], []
    for name, count in parts_of(config.text, wanted):
        kept = max(1, round(config.held_out * count / wanted))
        part = calibrate(
            model,
            name,
            num_samples=count + kept,
            seq_len=config.seq_len,
            seed=config.seed,
            bos=config.bos,
            fewer=True,
        )
        train.append(part.ids_NT[:-kept])
        held_out.append(part.ids_NT[-kept:])
        parts.append(part)
    all_NT, facts = torch.cat(train), together(parts).facts
    sequences = len(all_NT) // config.batch_size * config.batch_size
    if not sequences:
        raise ValueError(
            f"{facts['name']} has {facts['num_samples']} sequences of {config.seq_len} tokens, of which "
            f"{sum(map(len, held_out))} are held out; a step takes {config.batch_size}: name a larger text, or lower "
            "seq_len, batch_size or held_out"
        )
    order = torch.randperm(len(all_NT), generator=torch.Generator().manual_seed(config.seed))[:sequences]
    facts |= {"use": "training", "tokens": wanted * config.seq_len, "different_tokens": sequences * config.seq_len}
    return RecoveryText(all_NT[order], torch.cat(held_out), facts)
