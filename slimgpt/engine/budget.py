"""A budget in the user's terms, the size of the files or the number of parameters, becomes a ratio."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from slimgpt.config import MAX_RATIO, PruneConfig
from slimgpt.method.allocation import planned_shapes
from slimgpt.method.shapes import LayerShape

STEP = 0.005  # between ratios that are tried where widths cannot meet one


def within_budget(
    config: PruneConfig,
    shapes: Sequence[LayerShape],
    parameters: Callable[[list[LayerShape]], int],
    *,
    item: int,
    headers: int,
) -> PruneConfig:
    """The config with the ratio that meets its target, and no target; itself where it has none.

    The target is not exceeded, however the data divide it between heads and channels: where widths are rounded to the
    nearest, half a step of an FFN is kept in reserve.

    Args:
        config: may have a target.
        shapes: widths of the layers as they are.
        parameters: of the whole model with these widths.
        item: bytes of a stored weight.
        headers: bytes of the weight files beside the weights.

    Raises:
        ValueError: when the model is small enough already, or cannot become so small; the message names the nearest.
    """
    if not config.target:
        return config
    bare = replace(config, target_size="", target_parameters="")
    name, target = config.target
    unit = item if name == "target_size" else 1
    target -= headers if name == "target_size" else 0
    dense, projections = parameters(list(shapes)), sum(shape.parameters for shape in shapes)
    chosen = config.schedule == "nats"  # never removes less than the ratio
    reserve = 0 if chosen else max(shape.channel_parameters for shape in shapes) * config.ffn_multiple // 2

    def shown(count: float) -> str:
        return f"{count * unit / 1e6:,.1f} {'MB' if name == 'target_size' else 'M'}"

    def left_at(ratio: float) -> float:
        """Parameters of the planned model; infinite where widths cannot meet this ratio."""
        try:
            planned = parameters(planned_shapes(replace(bare, ratio=ratio), shapes))
            return dense - ratio * projections if chosen else planned
        except ValueError:
            return math.inf

    wanted = target / unit - reserve
    if target / unit >= dense:
        raise ValueError(f"{name} is {shown(target / unit)}; the model has {shown(dense)}: there is nothing to prune")
    ratio = _rounded((dense - wanted) / projections)
    while ratio <= MAX_RATIO:
        left = left_at(ratio)
        if left <= wanted:
            return replace(bare, ratio=ratio)
        ratio = _rounded(ratio + (STEP if left == math.inf else max(STEP / 100, (left - wanted) / projections)))
    least = min(left_at(i * STEP) for i in range(1, round(MAX_RATIO / STEP) + 1))
    if least == math.inf:
        planned_shapes(replace(bare, ratio=MAX_RATIO), shapes)  # raises, and says why
    raise ValueError(
        f"{name} is {shown(target / unit)}; the smallest that these options reach is {shown(least + reserve)}: "
        "ask for no less, or lower ffn_multiple and head_multiple"
    )


def _rounded(ratio: float) -> float:
    """Up, to as many digits as a command line may show."""
    return math.ceil(ratio * 1e6) / 1e6
