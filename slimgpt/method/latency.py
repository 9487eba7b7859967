"""A budget in time: what heads and channels cost in an engine, from a few models of other widths measured there.

Time is taken to be that of the dense model less what each layer saves; heads count by their number, an FFN by a line
through the widths that were measured. What an engine does beside the layers is never saved.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Self

from slimgpt.method.shapes import LayerShape

_SHARES = (0.75, 0.5, 0.25)  # of an FFN's width, measured beside the full one
_MULTIPLE = 64  # of the measured widths, where the FFN has room for it


@dataclass(frozen=True)
class LatencyTable:
    """What requests to a model take, and what of it the units of each layer do.

    Attributes:
        total_ms: of all requests together, with the dense model.
        shape: widths of each of its layers.
        layers: how many it has.
        head_ms, kv_head_ms: of one query head and of one kv head in one layer.
        ffn_ms: width and time of one layer's FFN, beginning with 0 and 0; lines lie between.
        measured: what was measured, and on what; for people.
    """

    total_ms: float
    shape: LayerShape
    layers: int
    head_ms: float
    kv_head_ms: float
    ffn_ms: tuple[tuple[int, float], ...]
    measured: dict[str, Any]

    @classmethod
    def of(
        cls,
        shape: LayerShape,
        layers: int,
        total_ms: float,
        probes: Sequence[tuple[LayerShape, float]],
        measured: dict[str, Any],
    ) -> Self:
        """The table behind measurements of ``probe_shapes``.

        Args:
            shape: widths of each dense layer.
            layers: of the model.
            total_ms: of the requests with the dense model.
            probes: the same with other widths in every layer.
            measured: as of the attribute.

        Raises:
            ValueError: when a narrower FFN saves nothing.
        """
        saved = [(probe, (total_ms - ms) / layers) for probe, ms in probes]
        head_ms = kv_head_ms = 0.0
        for probe, ms in saved:  # probes without query heads come before those without kv heads
            heads, kv_heads = shape.num_heads - probe.num_heads, shape.num_kv_heads - probe.num_kv_heads
            if not heads:
                continue
            if not kv_heads:
                head_ms = max(0.0, ms / heads)
            elif shape.num_heads == shape.num_kv_heads:
                head_ms = kv_head_ms = max(0.0, ms / (heads + kv_heads))
            else:
                kv_head_ms = max(0.0, (ms - heads * head_ms) / kv_heads)
        points, most = [(shape.intermediate_size, 0.0)], 0.0
        for probe, ms in sorted(saved, key=lambda one: -one[0].intermediate_size):
            if probe.intermediate_size < shape.intermediate_size:
                most = max(most, ms)  # a narrower one that seems slower is noise
                points.append((probe.intermediate_size, most))
        if not most:
            raise ValueError(
                f"a model with FFNs of {points[-1][0]} channels is not faster here than one with {points[0][0]}, so "
                "there is nothing to spend the time on; measure more or longer requests"
            )
        (w1, s1), (w2, s2) = points[-2:]
        whole = s2 + (s2 - s1) * w2 / (w1 - w2)
        ffn_ms = ((0, 0.0), *((width, whole - ms) for width, ms in reversed(points)))
        return cls(total_ms, shape, layers, head_ms, kv_head_ms, ffn_ms, measured)

    def heads_us(self, num_heads: int, num_kv_heads: int) -> int:
        """Microseconds of one layer's heads."""
        return round(1000 * (num_heads * self.head_ms + num_kv_heads * self.kv_head_ms))

    def ffn_us(self, width: int) -> int:
        """Microseconds of one layer's FFN, of at most the dense width."""
        for (w1, t1), (w2, t2) in pairwise(self.ffn_ms):
            if width <= w2:
                return round(1000 * (t1 + (t2 - t1) * (width - w1) / (w2 - w1)))
        raise AssertionError(f"{width} is wider than the dense {self.ffn_ms[-1][0]}")

    def layers_us(self, shapes: Sequence[LayerShape]) -> int:
        """Microseconds of all layers."""
        return sum(self.heads_us(s.num_heads, s.num_kv_heads) + self.ffn_us(s.intermediate_size) for s in shapes)

    def speedup(self, shapes: Sequence[LayerShape]) -> float:
        """How many times faster a model with these layers is than the dense one."""
        saved = self.layers_us([self.shape] * self.layers) - self.layers_us(shapes)
        return self.total_ms / (self.total_ms - saved / 1000)

    def digest(self) -> str:
        """Of all figures."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        ffn_ms = tuple((width, ms) for width, ms in data["ffn_ms"])
        return cls(**{**data, "shape": LayerShape(**data["shape"]), "ffn_ms": ffn_ms})


@dataclass(frozen=True)
class SpeedTarget:
    """How many times faster the pruned model has to be, by the table's count."""

    table: LatencyTable
    speedup: float

    @property
    def need_us(self) -> float:
        """Microseconds that go."""
        return 1000 * self.table.total_ms * (1 - 1 / self.speedup)


def probe_shapes(shape: LayerShape, *, heads: bool) -> list[LayerShape]:
    """Widths whose times give a table: narrower FFNs; fewer query heads in each group; fewer groups.

    Args:
        shape: of each dense layer.
        heads: whether the family's heads can be pruned.
    """
    multiple = _MULTIPLE if shape.intermediate_size >= 8 * _MULTIPLE else 1
    widths = [max(multiple, round(share * shape.intermediate_size / multiple) * multiple) for share in _SHARES]
    probes = [replace(shape, intermediate_size=width) for width in dict.fromkeys(widths)]
    per_group, kv_heads = shape.num_heads // shape.num_kv_heads, shape.num_kv_heads
    if heads and per_group > 1:
        probes.append(replace(shape, num_heads=kv_heads * (per_group // 2)))
    if heads and kv_heads > 1:
        probes.append(replace(shape, num_heads=per_group * (kv_heads // 2), num_kv_heads=kv_heads // 2))
    return probes
