"""A budget in the user's terms, the size of the files, parameters or speed, becomes a ratio."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from slimgpt.config import MAX_RATIO, PruneConfig
from slimgpt.method.allocation import planned_shapes, width_bounds
from slimgpt.method.latency import LatencyTable, SpeedTarget
from slimgpt.method.shapes import LayerShape
from slimgpt.quantities import BYTES, COUNTS, written

STEP = 0.005  # between ratios that are tried where widths cannot meet one


def within_budget(
    config: PruneConfig,
    shapes: Sequence[LayerShape],
    parameters: Callable[[list[LayerShape]], int],
    *,
    item: int,
    beside: int,
) -> PruneConfig:
    """The config with the ratio that meets its target, and no target; itself where it has none.

    The target is not exceeded, however the data divide it between heads and channels: where widths are rounded to the
    nearest, half a step of an FFN is kept in reserve.

    Args:
        config: may have a target.
        shapes: widths of the layers as they are.
        parameters: of the whole model with these widths.
        item: bytes of a stored projection weight, the least where they differ: what goes saves so much at least.
        beside: bytes of the weight files beside ``item`` for each parameter: headers, and what tensors of another dtype
            take more; below 0 where they take less.

    Raises:
        ValueError: when the model is small enough already, or cannot become so small; the message names the nearest.
    """
    if not config.target:
        return config
    bare = replace(config, target_size="", target_parameters="")
    name, target = config.target
    sized = name == "target_size"
    unit, beside = (item, beside) if sized else (1, 0)
    target = (target - beside) / unit  # in parameters from here on
    dense, projections = parameters(list(shapes)), sum(shape.parameters for shape in shapes)
    chosen = config.schedule == "nats"  # never removes less than the ratio
    reserve = 0 if chosen else max(shape.channel_parameters for shape in shapes) * config.ffn_multiple // 2

    def shown(*counts: float) -> list[str]:
        return written([math.ceil(count * unit + beside) for count in counts], BYTES if sized else COUNTS)

    def left_at(ratio: float) -> float:
        """Parameters of the planned model; infinite where widths cannot meet this ratio."""
        try:
            planned = parameters(planned_shapes(replace(bare, ratio=ratio), shapes))
            return dense - ratio * projections if chosen else planned
        except ValueError:
            return math.inf

    wanted = target - reserve
    if target >= dense:
        asked, has = shown(target, dense)
        raise ValueError(f"{name} is {asked}; the model has {has}: there is nothing to prune")
    ratio = _rounded((dense - wanted) / projections)
    while ratio <= MAX_RATIO:
        left = left_at(ratio)
        if left <= wanted:
            return replace(bare, ratio=ratio)
        ratio = _rounded(ratio + (STEP if left == math.inf else max(STEP / 100, (left - wanted) / projections)))
    least = min(left_at(i * STEP) for i in range(1, round(MAX_RATIO / STEP) + 1))
    if least == math.inf:
        planned_shapes(replace(bare, ratio=MAX_RATIO), shapes)  # raises, and says why
    asked, smallest = shown(target, least + reserve)
    raise ValueError(
        f"{name} is {asked}; the smallest that these options reach is {smallest}: "
        "ask for no less, or lower ffn_multiple and head_multiple"
    )


def within_time(
    config: PruneConfig, shapes: Sequence[LayerShape], table: LatencyTable | None
) -> tuple[PruneConfig, SpeedTarget]:
    """What a target in speed asks for, and the config with the ratio that roughly meets it, and no target.

    Raises:
        ValueError: when there is no table or one of another model, or it cannot become so fast; the message names the
            nearest.
    """
    asked = config.target_speedup
    if table is None:
        raise ValueError(
            f"target_speedup is {asked:g}, and what this model takes here is not measured; `slimgpt latency MODEL` "
            "measures it (in Python: latency=...)"
        )
    if list(shapes) != [table.shape] * table.layers:
        raise ValueError(
            f"target_speedup is {asked:g}, and the table of milliseconds is of {table.layers} layers of "
            f"{table.shape.overrides}; the model has others: measure its own, or, where its layers differ, set a ratio"
        )
    bare = replace(config, target_speedup=0.0)
    narrowest = [least for least, _ in width_bounds(bare, shapes)]
    most_us = min(table.layers_us(shapes) - table.layers_us(narrowest), MAX_RATIO * table.layers_us(shapes))
    fastest = math.floor(100 / (1 - most_us / (1000 * table.total_ms))) / 100
    target = SpeedTarget(table, asked)
    if target.need_us > most_us:
        raise ValueError(
            f"target_speedup is {asked:g}; the fastest that these options reach is {fastest:g}, since what the "
            "engine does beside the layers stays: ask for no more, or lower ffn_multiple and head_multiple"
        )
    ratio = STEP
    while ratio < MAX_RATIO:
        try:
            if table.speedup(planned_shapes(replace(bare, ratio=ratio), shapes)) >= asked:
                break
        except ValueError:  # the data may yet find widths that do
            ratio -= STEP
            break
        ratio += STEP
    return replace(bare, ratio=_rounded(min(ratio, MAX_RATIO))), target


def _rounded(ratio: float) -> float:
    """Up, to as many digits as a command line may show."""
    return math.ceil(ratio * 1e6) / 1e6
