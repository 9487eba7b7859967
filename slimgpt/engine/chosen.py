"""The widths that spend a budget of parameters or of time best, by prices and the log schedule."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf
from typing import Any

from torch import Tensor

from slimgpt.config import PruneConfig
from slimgpt.engine.prices import Prices
from slimgpt.method.allocation import layer_ratios
from slimgpt.method.knapsack import cheapest, few_kinds
from slimgpt.method.latency import SpeedTarget
from slimgpt.method.nats import HeadOption
from slimgpt.method.selection import BREAKDOWN, HeadPath
from slimgpt.method.shapes import LayerShape


class Chosen:
    """The widths that the knapsack chose: what an Allocation decides on the way is known before.

    Prices know each map alone: they take too much from early layers, whose errors meet those of all that follow. So
    FFN widths are then drawn towards a log schedule that begins with nothing: in the first layer ``config.log_share``
    of the way, by even steps less in those behind it, the last stays where prices put it.

    Args:
        prices: of the model.
        config: the budget, what may be pruned, and by how much heads count for more than their price.
        shapes: of the layers as they are.
        speed: the budget instead, in time; None for the ratio, in parameters.

    Attributes:
        heads, widths: what stays of each layer.
        nats: their price.

    Raises:
        ValueError: when the options cannot save so much.
    """

    def __init__(
        self, prices: Prices, config: PruneConfig, shapes: Sequence[LayerShape], speed: SpeedTarget | None = None
    ):
        self.prices, self.config, self.shapes, self.speed = prices, config, shapes, speed
        may_go = range(config.skip_first, len(shapes) - config.skip_last)
        heads = [
            layer.heads if i in may_go and config.targets != "ffn" else layer.heads[:1]
            for i, layer in enumerate(prices.layers)
        ]
        widths = [
            layer.widths if i in may_go and config.targets != "attention" else layer.widths[:1]
            for i, layer in enumerate(prices.layers)
        ]
        tables = [
            *(
                [(self._heads_saved(shape, o), config.head_price_factor * o.nats) for o in options]
                for shape, options in zip(shapes, heads, strict=True)
            ),
            *(
                [(self._ffn_saved(shape, w), nats) for w, nats in options]
                for shape, options in zip(shapes, widths, strict=True)
            ),
        ]
        sizes = [
            self._heads_cost(s, s.num_heads, s.num_kv_heads) + self._ffn_cost(s, s.intermediate_size) for s in shapes
        ]
        ratio = speed.need_us / sum(sizes) if speed else config.ratio
        need = ceil(ratio * sum(sizes) - 1e-6)  # a product that is a hair over
        layouts = [[(o.num_heads, o.num_kv_heads) for o in options] for options in heads]
        # a model that was pruned before may have more: its heads do not come back
        most = max(config.max_head_shapes, len({options[0] for options in layouts}))
        picked = cheapest(tables, need)
        try:
            picked = few_kinds(tables, layouts, need, picked, most)
        except ValueError as error:
            raise ValueError(f"max_head_shapes is {config.max_head_shapes}; raise it: {error}") from None
        self.heads = [options[k] for options, k in zip(heads, picked[: len(shapes)], strict=True)]
        chosen = [options[k] for options, k in zip(widths, picked[len(shapes) :], strict=True)]
        self.widths = [width for width, _ in chosen]
        if config.log_share > 0:
            by_log = layer_ratios(replace(config, schedule="log", first_ratio_share=0.0, ratio=ratio), sizes)
            places = [share * size for share, size in zip(by_log, sizes, strict=True)]
            self._draw_to_log([[width for width, _ in options] for options in widths], places, need)
        nats = [dict(options)[width] for options, width in zip(widths, self.widths, strict=True)]
        self.nats = sum(o.nats for o in self.heads) + sum(nats)

    def _draw_to_log(self, options: Sequence[Sequence[int]], by_log: Sequence[float], need: int) -> None:
        """Bring each layer's total to its place between the plan and the log schedule, by the width of its FFN.

        What all places together are off the budget, each layer bears alike.

        Args:
            options: widths of each layer, falling.
            by_log: what each layer gives up by the log schedule.
            need: what goes at least; it is passed by less than one step of a width.
        """
        shapes, last = self.shapes, max(1, len(self.shapes) - 1)
        heads = [self._heads_saved(shape, o) for shape, o in zip(shapes, self.heads, strict=True)]
        behind = []  # what each FFN has still to give up
        for i, shape in enumerate(shapes):
            share = self.config.log_share * (1 - i / last)
            by_prices = self._ffn_saved(shape, self.widths[i])
            behind.append(share * (by_log[i] - heads[i]) + (1 - share) * by_prices)
        at, left = [0] * len(shapes), need - sum(heads)  # the option of each layer: from the widest, a step at a time
        while left > 0:
            i = max((i for i in range(len(shapes)) if at[i] + 1 < len(options[i])), key=behind.__getitem__)
            wide, narrow = options[i][at[i]], options[i][at[i] + 1]
            step = self._ffn_saved(shapes[i], narrow) - self._ffn_saved(shapes[i], wide)
            at[i], behind[i], left = at[i] + 1, behind[i] - step, left - step
        self.widths = [widths[o] for widths, o in zip(options, at, strict=True)]

    @property
    def planned(self) -> list[LayerShape]:
        """What stays of each layer."""
        return [
            replace(shape, num_heads=o.num_heads, num_kv_heads=o.num_kv_heads, intermediate_size=width)
            for shape, o, width in zip(self.shapes, self.heads, self.widths, strict=True)
        ]

    def plan(self) -> dict[str, Any]:
        """For the journal."""
        widths = [[o.num_heads, o.num_kv_heads, width] for o, width in zip(self.heads, self.widths, strict=True)]
        return {"prices": self.prices.digest(), "widths": widths}

    def heads_may_go(self, i: int) -> bool:
        """Whether layer ``i`` loses any."""
        return bool(self.heads[i].order)

    def head_limit(self, i: int) -> float:  # noqa: ARG002
        """None beside the order."""
        return inf

    def head_order(self, i: int) -> tuple[tuple[int, int], ...]:
        """The kinds of unit that go."""
        return self.heads[i].order

    def cut_heads(self, i: int, path: HeadPath, gain: float = 1.0) -> int:  # noqa: ARG002
        """All that were chosen."""
        if path.broken:
            raise ValueError(f"{path.name}: {BREAKDOWN}")
        return len(path.steps)

    def ffn_width(self, i: int, heads: int, kv_heads: int) -> int:  # noqa: ARG002
        """As chosen."""
        return self.widths[i]

    def roots(self, i: int) -> dict[str, Tensor]:
        """R of ``attention`` and of ``ffn``."""
        return self.prices.roots(i)

    def settle(self, i: int, after: LayerShape, ffn_price: float = 0.0) -> None:
        """Nothing is carried from layer to layer."""

    def _heads_saved(self, shape: LayerShape, option: HeadOption) -> int:
        dense = self._heads_cost(shape, shape.num_heads, shape.num_kv_heads)
        return dense - self._heads_cost(shape, option.num_heads, option.num_kv_heads)

    def _ffn_saved(self, shape: LayerShape, width: int) -> int:
        return self._ffn_cost(shape, shape.intermediate_size) - self._ffn_cost(shape, width)

    def _heads_cost(self, shape: LayerShape, num_heads: int, num_kv_heads: int) -> int:
        """Microseconds or parameters of so many heads."""
        if self.speed:
            return self.speed.table.heads_us(num_heads, num_kv_heads)
        return shape.heads.cost(num_heads, num_kv_heads)

    def _ffn_cost(self, shape: LayerShape, width: int) -> int:
        """Microseconds or parameters of an FFN."""
        return self.speed.table.ffn_us(width) if self.speed else width * shape.channel_parameters
