"""How many units go where: the ratio of each layer, what heads may cost, rounding to servable widths, cuts of paths.

selection.py orders units, this module says how many of them go, obs.refit does the rest.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, log

from torch import Tensor

from slimgpt.config import MAX_RATIO, PruneConfig
from slimgpt.method.selection import BREAKDOWN, HeadPath
from slimgpt.method.shapes import HeadLayout, LayerShape

MOST_WIDTHS = 256  # of one FFN that get a price
TOLERANCE = 0.005  # the ratio is met within half a percentage point


def layer_ratios(config: PruneConfig, sizes: list[int]) -> list[float]:
    """The ratio of each decoder layer (paper section 3.4); together they remove ``config.ratio``.

    Skipped layers get 0, the others carry their share; a falling schedule runs through them from the last to the first.

    Args:
        config: schedule, ratio, layers to skip.
        sizes: parameters of each layer's projections (they differ where the model has been pruned before).

    Raises:
        ValueError: when too few layers are left to carry the ratio, or explicit ratios do not fit the model.
    """
    num_layers = len(sizes)
    if config.schedule == "explicit":
        if len(config.layer_ratios) != num_layers:
            raise ValueError(f"layer_ratios has {len(config.layer_ratios)} entries; the model has {num_layers} layers")
        mean = sum(r * size for r, size in zip(config.layer_ratios, sizes, strict=True)) / sum(sizes)
        if abs(mean - config.ratio) > 1e-3:
            raise ValueError(f"layer_ratios remove {mean:.4f}; ratio is {config.ratio}; make them agree")
        return list(config.layer_ratios)
    active = num_layers - config.skip_first - config.skip_last
    if active < 1:
        raise ValueError(
            f"skip_first {config.skip_first} and skip_last {config.skip_last} leave no layer of {num_layers} to prune"
        )
    weights = sizes[config.skip_first : num_layers - config.skip_last]
    mean = config.ratio * sum(sizes) / sum(weights)
    if mean > MAX_RATIO + 1e-9:  # more than rounding
        raise ValueError(
            f"{active} of {num_layers} layers would have to lose {mean:.2f} of their parameters to reach ratio "
            f"{config.ratio}; the limit is {MAX_RATIO}: skip fewer layers or lower the ratio"
        )
    if config.schedule in ("uniform", "nats") or active == 1:
        curve = [mean] * active
    else:
        by_log = config.schedule in ("log", "log_decreasing")
        rise = [log(i + 1) / log(active) if by_log else i / (active - 1) for i in range(active)]
        if config.schedule in ("log_decreasing", "linear_decreasing"):
            rise.reverse()
        share = sum(w * r for w, r in zip(weights, rise, strict=True)) / sum(weights)
        least = config.first_ratio_share * mean
        most = (mean - least * (1 - share)) / share
        if most > MAX_RATIO:  # no layer can carry that much: start higher
            most = MAX_RATIO
            least = (mean - most * share) / (1 - share)
        curve = [least + (most - least) * r for r in rise]
    return [0.0] * config.skip_first + curve + [0.0] * config.skip_last


class Allocation:
    """Settles the widths of a model's layers one after the other, first to last.

    A layer's heads go within its share of the ratio, and its FFN makes up the rest. What rounding to whole units leaves
    is carried to the next layer, so the total holds.

    Heads have a price by default: what a parameter costs in the FFN of the layer before, whose output adds to the same
    residual stream. Heads that cost more stay. Nothing is known before the first FFN, so its layer keeps its heads.

    Attributes:
        ratios: of each layer.

    Raises:
        ValueError: for a schedule that these layers cannot carry.
    """

    def __init__(self, config: PruneConfig, dense: Sequence[LayerShape]):
        self.config, self.dense = config, dense
        self.ratios = layer_ratios(config, [shape.parameters for shape in dense])
        self._carry = 0.0
        self._price = 0.0 if config.head_budget == "price" and config.targets == "all" else inf

    def head_limit(self, i: int) -> float:
        """Parameters that may go from q, k, v and o of layer ``i``: never more than the layer's share."""
        return _head_limit(self.config, self.dense[i], self.ratios[i], self._carry)

    def _heads_needed(self, i: int) -> float:
        """Parameters that heads must give up whatever they cost, since the FFN alone cannot make up for them."""
        ratio, shape = self.ratios[i], self.dense[i]
        most = (shape.intermediate_size - self.config.ffn_multiple) * shape.channel_parameters
        return ratio * shape.parameters + self._carry - most if ratio > 0 else 0.0

    def heads_may_go(self, i: int) -> bool:
        """Whether any path of layer ``i`` could be cut after its first step; else none need be made."""
        heads = self.dense[i].heads
        smallest = min((heads.cost(*unit) for unit in _units(self.config, heads)), default=inf)
        return self.head_limit(i) >= smallest and (self._price > 0 or self._heads_needed(i) > 0)

    def head_order(self, i: int) -> None:
        """Any: the cheapest kind of unit goes first."""

    def roots(self, i: int) -> dict[str, Tensor]:  # noqa: ARG002
        """None: errors count as they are."""
        return {}

    def cut_heads(self, i: int, path: HeadPath, gain: float = 1.0) -> int:
        """How many steps of ``path`` are taken.

        Args:
            i: the layer.
            path: made within ``head_limit(i)``.
            gain: energy in the residual stream for energy out of ``o_proj``, where a norm lies between the two.

        Raises:
            ValueError: when the path ends before the cut because H is too ill-conditioned.
        """
        price, needed = self._price / gain, self._heads_needed(i)
        for count, step in enumerate(path.steps):
            if needed <= 0 and step.error > price * step.parameters:
                return count
            needed -= step.parameters
        if path.broken:
            raise ValueError(f"{path.name}: {BREAKDOWN}")
        return len(path.steps)

    def ffn_width(self, i: int, heads: int, kv_heads: int) -> int:
        """The FFN width that brings layer ``i`` closest to its target when so many heads stay.

        A multiple of ``ffn_multiple``, or the dense width.
        """
        return _closest_width(self.config, self.dense[i], self.ratios[i], self._target(i, heads, kv_heads))

    def settle(self, i: int, after: LayerShape, ffn_price: float = 0.0) -> None:
        """Go on from layer ``i``, whose widths are ``after``.

        Args:
            i: the layer.
            after: its widths.
            ffn_price: error per parameter of the last channels that went; 0 where none went.
        """
        if self.ratios[i] > 0:
            channels = self.dense[i].intermediate_size - after.intermediate_size
            target = self._target(i, after.num_heads, after.num_kv_heads)
            self._carry = target - channels * self.dense[i].channel_parameters
        if self._price < inf and ffn_price > 0:
            self._price = ffn_price

    def _target(self, i: int, heads: int, kv_heads: int) -> float:
        """Parameters that the FFN of layer ``i`` should give up."""
        shape = self.dense[i]
        removed = shape.heads.parameters - shape.heads.cost(heads, kv_heads)
        return self.ratios[i] * shape.parameters + self._carry - removed


def _head_limit(config: PruneConfig, shape: LayerShape, ratio: float, carry: float) -> float:
    if config.targets == "ffn" or ratio == 0:  # a layer with ratio 0 is left alone, whatever is carried to it
        return 0.0
    if config.targets == "attention":
        return max(0.0, ratio * shape.parameters + carry)
    return ratio * shape.heads.parameters


def _closest_width(config: PruneConfig, shape: LayerShape, ratio: float, target: float) -> int:
    width, multiple = shape.intermediate_size, config.ffn_multiple
    if config.targets == "attention" or ratio == 0:
        return width
    wanted = width - target / shape.channel_parameters
    kept = min(width, max(multiple, multiple * round(wanted / multiple)))
    return width if abs(width - wanted) < abs(kept - wanted) else kept


def planned_shapes(config: PruneConfig, dense: Sequence[LayerShape]) -> list[LayerShape]:
    """The widths of each layer when the largest units of heads that fit are removed, whatever the data say.

    The FFN makes up the difference, so the totals hold for any other choice of heads, too. For the schedule nats, which
    spreads the ratio by prices, it is the case where every layer loses the same.

    Raises:
        ValueError: for a ratio that these options cannot reach.
    """
    allocation, shapes = Allocation(config, dense), []
    for i, shape in enumerate(dense):
        left, limit = shape.heads, allocation.head_limit(i)
        while units := [unit for unit in _units(config, left) if left.cost(*unit) <= limit]:
            largest = max(units, key=lambda unit: left.cost(*unit))
            limit -= left.cost(*largest)
            left = _without(left, largest)
        width = allocation.ffn_width(i, left.num_heads, left.num_kv_heads)
        shapes.append(replace(shape, num_heads=left.num_heads, num_kv_heads=left.num_kv_heads, intermediate_size=width))
        allocation.settle(i, shapes[-1])
    total = sum(shape.parameters for shape in dense)
    if config.schedule == "nats":
        most = 1 - sum(narrowest.parameters for narrowest, _ in width_bounds(config, dense)) / total
        if config.ratio > most:
            raise ValueError(
                f"ratio {config.ratio} cannot be met: the fewest heads and an FFN of {config.ffn_multiple} channels "
                f"in each layer give {most:.3f}; lower ffn_multiple, head_multiple or ratio, or raise max_head_shapes"
            )
        return shapes
    reached = 1 - sum(shape.parameters for shape in shapes) / total
    if abs(reached - config.ratio) > TOLERANCE:
        raise ValueError(
            f"ratio {config.ratio} cannot be met: complete heads and FFN widths in multiples of "
            f"{config.ffn_multiple} give {reached:.3f}; lower ffn_multiple or head_multiple, "
            "choose another ratio, or prune both heads and FFN"
        )
    return shapes


def width_bounds(config: PruneConfig, dense: Sequence[LayerShape]) -> list[tuple[LayerShape, LayerShape]]:
    """The fewest and the most heads, kv heads and channels that each layer can come out with, whatever the data say.

    Both are equal where the widths do not depend on the data: where only one kind of unit may go, and has no price.
    """
    priced = config.head_budget == "price" and config.targets == "all"
    low = high = 0.0  # what may be carried to a layer
    bounds, skipped = [], {s.heads for s in (*dense[: config.skip_first], *dense[len(dense) - config.skip_last :])}
    # Where skipped layers have all the layouts that may be in use, the others cannot bring in another one.
    only = skipped if len(skipped) >= max(config.max_head_shapes, len({s.heads for s in dense})) else set()
    for shape, ratio in zip(dense, layer_ratios(config, [shape.parameters for shape in dense]), strict=True):
        if ratio == 0 or config.schedule == "nats":
            bounds.append((shape if ratio == 0 else _narrowest(config, shape, only), shape))
            continue
        options = _reachable(config, shape.heads, _head_limit(config, shape, ratio, high))
        gone = {left: shape.heads.parameters - left.parameters for left in options}
        fewest_gone = 0
        if not priced:  # removal ends where no unit fits any more
            limit = _head_limit(config, shape, ratio, low)
            final = [
                gone[left]
                for left in options
                if gone[left] <= limit
                and not any(gone[left] + left.cost(*unit) <= limit for unit in _units(config, left))
            ]
            fewest_gone = min(final)
        options = [left for left in options if gone[left] >= fewest_gone]
        most_gone = max(gone[left] for left in options)
        target = ratio * shape.parameters
        least, most = target + low - most_gone, target + high - fewest_gone  # parameters that the FFN should give up
        narrow, wide = (_closest_width(config, shape, ratio, parameters) for parameters in (most, least))
        bounds.append(
            (
                _with(shape, min(o.num_heads for o in options), min(o.num_kv_heads for o in options), narrow),
                _with(shape, max(o.num_heads for o in options), max(o.num_kv_heads for o in options), wide),
            )
        )
        full, channel = shape.intermediate_size, shape.channel_parameters
        after = least - (full - wide) * channel, most - (full - narrow) * channel
        rounding = 0.0 if least == most else config.ffn_multiple * channel / 2  # of targets between the two
        low, high = (min(*after, -rounding), max(*after, rounding)) if rounding else after
    return bounds


def ffn_widths(full: int, multiple: int) -> list[int]:
    """The dense width and those below it that get a price, falling: multiples of ``multiple``, MOST_WIDTHS or so."""
    step = multiple * -(-full // (multiple * MOST_WIDTHS))
    return [full, *range((full - 1) // step * step, 0, -step)]


def _narrowest(config: PruneConfig, shape: LayerShape, only: set[HeadLayout]) -> LayerShape:
    """What is left when all goes that may; ``only`` these layouts of heads, or any."""
    heads, width = shape.heads, shape.intermediate_size
    if config.targets != "ffn":
        layouts = [left for left in _reachable(config, heads, inf) if not only or left in only]
        heads = min(layouts, key=lambda left: left.parameters)
    if config.targets != "attention":
        width = ffn_widths(width, config.ffn_multiple)[-1]
    return _with(shape, heads.num_heads, heads.num_kv_heads, width)


def _units(config: PruneConfig, left: HeadLayout) -> list[tuple[int, int]]:
    return left.units(config.head_unit, config.head_multiple)


def _without(left: HeadLayout, unit: tuple[int, int]) -> HeadLayout:
    return replace(left, num_heads=left.num_heads - unit[0], num_kv_heads=left.num_kv_heads - unit[1])


def _with(shape: LayerShape, heads: int, kv_heads: int, width: int) -> LayerShape:
    return replace(shape, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=width)


def _reachable(config: PruneConfig, dense: HeadLayout, limit: float) -> list[HeadLayout]:
    """Every layout that removals of units within ``limit`` parameters can lead to, the dense one first."""
    layouts = [dense]
    for left in layouts:  # it grows meanwhile
        for unit in _units(config, left):
            after = _without(left, unit)
            if dense.parameters - after.parameters <= limit and after not in layouts:
                layouts.append(after)
    return layouts
