"""How a pruned model is trained again."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from slimgpt.config.fields import BOS_WORDS, check_limits, option
from slimgpt.quantities import COUNTS, read_quantity

_LEARNING_RATES = {"lora": 2e-3, "all": 3e-4}


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """How a pruned model learns to predict what its teacher predicts.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    tokens: str = option(
        "2M", "Tokens to train on, such as 131072, 500k or 2M; a text that is shorter is read several times."
    )
    teacher: str = option(
        "", "Model whose distributions are learned: a folder or a name as for MODEL; empty: the one that was pruned."
    )
    text: str = option(
        "auto",
        "Text to train on: as for calibration, so also several with their shares: c4,notes.txt:0.2. Part of it is held "
        "out and decides which state of the training is kept.",
    )
    trainable: Literal["lora", "all"] = option(
        "lora", "What is trained: low-rank adapters of all projections, merged at the end; or the decoder layers."
    )
    rank: int = option(16, "lora: rank of the adapters.", ge=1)
    learning_rate: float = option(0.0, "Peak of the learning rate; 0: 2e-3 for lora, 3e-4 for all.", ge=0, le=1)
    batch_size: int = option(4, "Sequences per optimizer step, of all processes together.", ge=1)
    seq_len: int = option(1024, "Tokens per sequence.", ge=2)
    block_tokens: int = option(4096, "Tokens that pass the model at once; lower it to save memory.", ge=1)
    held_out: int = option(8, "Sequences that are held out.", ge=1)
    seed: int = option(1, "Which passages are drawn; by default others than for calibration.", ge=0)
    bos: Literal["auto", "none", "stream", "block"] = option("auto", BOS_WORDS)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Dtype of the products; auto is bfloat16 where the device computes it fast, else float32."
    )

    def __post_init__(self) -> None:
        check_limits(self)
        if self.tokens:
            _number(self.tokens)

    @property
    def peak_learning_rate(self) -> float:
        """The rate after warming up."""
        return self.learning_rate or _LEARNING_RATES[self.trainable]

    @property
    def steps(self) -> int:
        """Optimizer steps: so many that ``tokens`` are read, rounded up.

        Raises:
            ValueError: where no tokens are given.
        """
        if not self.tokens:
            raise ValueError("tokens is empty; say how many tokens the model is trained on, such as 2M")
        return -(-_number(self.tokens) // (self.batch_size * self.seq_len))

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML hold it."""
        return dataclasses.asdict(self)

    def fingerprint(self) -> str:
        """sha256 of every field: two runs that differ in any setting are two runs."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def _number(tokens: str) -> int:
    return int(tokens) if tokens.isdecimal() and int(tokens) else read_quantity(tokens, COUNTS, "tokens")
