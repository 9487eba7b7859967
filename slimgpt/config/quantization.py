"""How a model's weights are stored in fewer bits."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from slimgpt.config.fields import BOS_WORDS, check_limits, option


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How a model is quantised, by llm-compressor, for vLLM and transformers.

    Raises:
        ValueError: on construction, when a field is outside its limits or two fields contradict each other.
    """

    scheme: Literal["", "w4a16", "w8a8", "fp8"] = option(
        "w4a16",
        "w4a16: weights in 4 bits; w8a8: weights and activations as 8-bit integers; fp8: both as 8-bit floats, without "
        "any text. Empty: not at all.",
    )
    group_size: int = option(
        0,
        "w4a16: weights of a row that share a scale; 0: the largest of 128, 64 and 32 that divides the input of every "
        "projection, else the entire row.",
        ge=0,
    )
    calibration: str = option(
        "auto", "w4a16 and w8a8: text whose activations say which rounding errors matter; as for pruning."
    )
    num_samples: int = option(128, "Sequences of that text.", ge=1)
    seq_len: int = option(2048, "Tokens per sequence.", ge=1)
    seed: int = option(0, "Which passages are drawn.", ge=0)
    bos: Literal["auto", "none", "stream", "block"] = option("auto", BOS_WORDS)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")

    def __post_init__(self) -> None:
        check_limits(self)
        if self.group_size and self.scheme != "w4a16":
            raise ValueError(
                f"group_size is {self.group_size} and scheme {self.scheme!r}, which has one scale for each row; leave "
                "group_size out, or take w4a16"
            )
        if self.group_size % 32:
            raise ValueError(f"group_size is {self.group_size}; it must be a multiple of 32, which vLLM's kernels take")

    @property
    def reads_text(self) -> bool:
        """Whether the scheme needs calibration text."""
        return self.scheme in ("w4a16", "w8a8")

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML hold it."""
        return dataclasses.asdict(self)
