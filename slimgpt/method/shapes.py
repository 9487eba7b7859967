"""The widths of a decoder layer, and which units may be taken from it."""

from dataclasses import dataclass
from math import gcd
from typing import Literal

import torch
from torch import Tensor

Unit = Literal["query", "kv", "channel"]


@dataclass(frozen=True)
class HeadLayout:
    """How the columns of ``o_proj`` belong to heads, and heads to kv groups.

    Attributes:
        num_heads: query heads; ``num_heads % num_kv_heads == 0``.
        num_kv_heads: kv heads.
        head_dim: consecutive columns per head.
        hidden_size: width of the residual stream, which gives a head's parameters.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int

    @property
    def parameters(self) -> int:
        """Weights of q, k, v and o."""
        return self.cost(self.num_heads, self.num_kv_heads)

    def cost(self, heads: int, kv_heads: int) -> int:
        """Weights of ``heads`` query heads (rows of q, columns of o) and ``kv_heads`` kv heads (rows of k and v)."""
        return 2 * (heads + kv_heads) * self.head_dim * self.hidden_size

    def columns(self, heads: list[int]) -> Tensor:
        """The columns of o_proj (or rows of q, k, v) that belong to these heads ``[len(heads) * head_dim]``."""
        starts = torch.tensor(heads, dtype=torch.long)[:, None] * self.head_dim
        return (starts + torch.arange(self.head_dim)).flatten()

    def units(self, unit: str, multiple: int) -> list[tuple[int, int]]:
        """The kinds of unit that may go now, as (query heads, kv heads). One unit of each kind always stays."""
        per_group, units = self.num_heads // self.num_kv_heads, []
        if unit != "query" and self.num_kv_heads > multiple and self.num_kv_heads % multiple == 0:
            units.append((multiple * per_group, multiple))
        take = multiple // gcd(self.num_kv_heads, multiple)
        if unit != "kv_group" and per_group > take:
            units.append((take * self.num_kv_heads, 0))
        return units


@dataclass(frozen=True)
class LayerShape:
    """The widths of one decoder layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    @property
    def heads(self) -> HeadLayout:
        """How its heads are laid out."""
        return HeadLayout(self.num_heads, self.num_kv_heads, self.head_dim, self.hidden_size)

    @property
    def channel_parameters(self) -> int:
        """Weights of one FFN channel in gate, up and down."""
        return 3 * self.hidden_size

    @property
    def parameters(self) -> int:
        """Weights of the seven projections."""
        return self.heads.parameters + self.channel_parameters * self.intermediate_size

    def width(self, unit: Unit) -> int:
        """Rows of a block of this unit."""
        if unit == "channel":
            return self.intermediate_size
        return self.head_dim * (self.num_heads if unit == "query" else self.num_kv_heads)

    @property
    def overrides(self) -> dict[str, int]:
        """As an entry of ``config.per_layer_config``."""
        return {
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }
