"""How many go: the ratio of each layer (Incremental Pruning Ratio, paper section 3.4) and its rounding to units."""

from dataclasses import dataclass
from math import log

from slimgpt.config import MAX_RATIO, PruneConfig


def layer_ratios(config: PruneConfig, sizes: list[int]) -> list[float]:
    """The ratio of each decoder layer; together they remove ``config.ratio``.

    Skipped layers get 0, the others carry their share.

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
    if config.schedule == "uniform" or active == 1:
        curve = [mean] * active
    else:
        rise = [log(i + 1) / log(active) if config.schedule == "log" else i / (active - 1) for i in range(active)]
        share = sum(w * r for w, r in zip(weights, rise, strict=True)) / sum(weights)
        first = config.first_ratio_share * mean
        last = (mean - first * (1 - share)) / share
        if last > MAX_RATIO:  # the last layer cannot carry that much: start higher
            last = MAX_RATIO
            first = (mean - last * share) / (1 - share)
        curve = [first + (last - first) * r for r in rise]
    return [0.0] * config.skip_first + curve + [0.0] * config.skip_last


@dataclass
class Budget:
    """Turns ratios into parameters to remove, layer by layer, and carries each layer's rounding to the next."""

    config: PruneConfig
    carry: float = 0.0

    def heads(self, ratio: float, attention_parameters: int, layer_parameters: int) -> float:
        """Parameters that may go from q, k, v and o: never more than the layer's share, the FFN absorbs the rest."""
        if self.config.targets == "ffn":
            return 0.0
        if self.config.targets == "attention":
            return max(0.0, ratio * layer_parameters + self.carry)
        return ratio * attention_parameters

    def forced(self, ratio: float, layer_parameters: int, channel_parameters: int, width: int) -> float:
        """Parameters that heads must give up whatever they cost, since the FFN alone cannot make up for them."""
        return ratio * layer_parameters + self.carry - (width - self.config.ffn_multiple) * channel_parameters

    def ffn_width(self, ratio: float, layer_parameters: int, removed: int, channel_parameters: int, width: int) -> int:
        """The FFN width that brings the layer closest to its target, a multiple of ``ffn_multiple`` or the dense width.

        Args:
            ratio: the layer's ratio.
            layer_parameters: weights of its seven projections.
            removed: weights its heads have already given up.
            channel_parameters: weights of one channel (gate, up and down).
            width: dense FFN width.
        """
        target = ratio * layer_parameters + self.carry - removed
        kept = width
        if self.config.targets != "attention" and ratio > 0:
            multiple = self.config.ffn_multiple
            wanted = width - target / channel_parameters
            kept = min(width, max(multiple, multiple * round(wanted / multiple)))
            if abs(width - wanted) < abs(kept - wanted):
                kept = width
        self.carry = target - (width - kept) * channel_parameters if ratio > 0 else self.carry
        return kept
