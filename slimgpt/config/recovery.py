"""How a pruned model is trained again."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from slimgpt.config.fields import BOS_WORDS, check_limits, option, whole_as_text
from slimgpt.quantities import COUNTS, read_quantity

ENTIRE = "all"
# What a method does where a field is 0. That of lora is the paper's, which follows LLM-Pruner.
_OWN: dict[str, dict[str, Any]] = {
    "distill": {"rank": 16, "batch_size": 1},
    "lora": {"rank": 8, "batch_size": 64, "seq_len": 256, "held_out": 128},
}
# distill: few tokens teach more in many small steps (benchmarks/RESULTS.md); the longest sequences that leave so many
# steps are taken, else the shortest.
_STEPS, _LENGTHS, _HELD_OUT_TOKENS = 512, (1024, 512, 256), 8192
# Those of distill are for steps of so many tokens; others take the root of their share.
_STEP_TOKENS = 1024
_LEARNING_RATES = {("distill", "lora"): 2.5e-3, ("distill", "all"): 3e-4, ("lora", "lora"): 1e-4}


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """How a pruned model learns again, by default to predict what its teacher predicts.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    tokens: str = option(
        "2M",
        "Tokens to train on, such as 131072, 500k or 2M; a text that is shorter is read several times. lora: also all, "
        "the entire text once.",
    )
    method: Literal["distill", "lora"] = option(
        "distill",
        "distill: the next-word distributions of a teacher, on plain text. lora: the paper's, the answers to "
        "instructions.",
    )
    teacher: str = option(
        "",
        "distill: model whose distributions are learned: a folder or a name as for MODEL; empty: the one that was "
        "pruned.",
    )
    text: str = option(
        "auto",
        "distill: text as for calibration, so also several with their shares: c4,notes.txt:0.2. lora: a .jsonl or "
        ".parquet file with instruction, input and output, or alpaca. Part is held out; it decides what is kept.",
    )
    trainable: Literal["lora", "all"] = option(
        "lora", "What is trained: low-rank adapters of all projections, merged at the end; or the decoder layers."
    )
    rank: int = option(0, "Rank of the adapters; 0: 16 for distill, 8 for lora.", ge=0)
    learning_rate: float = option(
        0.0,
        "Peak of the learning rate; 0: for distill 2.5e-3 for adapters and 3e-4 for all, times the root of a step's "
        "tokens / 1024; 1e-4 for lora.",
        ge=0,
        le=1,
    )
    batch_size: int = option(
        0,
        "Sequences per optimizer step, of all processes together; 0: 1 for distill (or one per process), 64 for lora.",
        ge=0,
    )
    seq_len: int = option(
        0,
        "Tokens per sequence, for lora at most; 0: for distill 1024, or 512 or 256 where that would be fewer than 512 "
        "steps; 256 for lora.",
        ge=0,
    )
    block_tokens: int = option(4096, "Tokens that pass the model at once; lower it to save memory.", ge=1)
    held_out: int = option(0, "Sequences that are held out; 0: those of 8,192 tokens for distill, 128 for lora.", ge=0)
    seed: int = option(
        1,
        "Which passages are drawn; by default others than for calibration.",
        ge=0,
        le=2**32 - 1,  # numpy's, which Trainer seeds
    )
    bos: Literal["auto", "none", "stream", "block"] = option("auto", BOS_WORDS)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Dtype of the products; auto is bfloat16 where the device computes it fast, else float32."
    )

    def __post_init__(self) -> None:
        whole_as_text(self, "tokens")
        check_limits(self)
        if self.tokens == ENTIRE and self.method != "lora":
            raise ValueError(f"tokens is {ENTIRE!r} and method {self.method!r}; say how many tokens, such as 2M")
        if self.tokens not in ("", ENTIRE):
            read_quantity(self.tokens, COUNTS, "tokens")
        if self.seq_len == 1:
            raise ValueError("seq_len is 1; it must be at least 2: the first token of a sequence predicts the second")
        if self.method == "lora" and self.teacher:
            raise ValueError(
                f"method is 'lora' and teacher {self.teacher}; it learns from answers and not from a teacher: leave "
                "teacher out, or take the method distill"
            )
        if self.method == "lora" and self.trainable != "lora":
            raise ValueError(f"method is 'lora' and trainable {self.trainable!r}; the paper's method trains adapters")

    def filled(self, processes: int = 1) -> "RecoverConfig":
        """With the method's own values for the fields that are 0.

        Args:
            processes: that share a step's sequences; there are as many at least.

        Raises:
            ValueError: where no tokens are given.
        """
        if not self.tokens:
            raise ValueError("tokens is empty; say how many tokens the model is trained on, such as 2M")
        own = {name: value for name, value in _OWN[self.method].items() if not getattr(self, name)}
        if "batch_size" in own:
            own["batch_size"] = processes * -(-own["batch_size"] // processes)
        if self.token_count is not None and self.method == "distill":
            own["seq_len"] = length = self.seq_len or _length(
                self.token_count // own.get("batch_size", self.batch_size)
            )
            own["held_out"] = self.held_out or max(1, _HELD_OUT_TOKENS // length)
        filled = dataclasses.replace(self, **own)
        rate = self.learning_rate or filled._own_rate
        return dataclasses.replace(filled, learning_rate=rate)

    @property
    def _own_rate(self) -> float:
        """The method's own learning rate, once the other fields are filled."""
        rate = _LEARNING_RATES[self.method, self.trainable]
        step = self.batch_size * self.seq_len / _STEP_TOKENS if self.method == "distill" else 1
        return float(f"{min(1.0, rate * step**0.5):.3g}")

    @property
    def token_count(self) -> int | None:
        """How many tokens are read; None for the entire text once."""
        return None if self.tokens == ENTIRE else read_quantity(self.tokens, COUNTS, "tokens")

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML hold it."""
        return dataclasses.asdict(self)


def _length(tokens: int) -> int:
    """Of a sequence, where a step reads one of all of its sequences' ``tokens``."""
    return next((length for length in _LENGTHS if tokens >= _STEPS * length), _LENGTHS[-1])
