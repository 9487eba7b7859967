"""Widths drawn from prices towards the log schedule: the budget, and each layer's place between the two."""

from dataclasses import replace

import pytest

from slimgpt.method.allocation import layer_ratios

from .test_prices import chosen, own_cache  # noqa: F401  (a fixture of every test)


def gone(plan):
    """Parameters that each layer loses."""
    return [
        shape.parameters
        - replace(shape, num_heads=o.num_heads, num_kv_heads=o.num_kv_heads, intermediate_size=w).parameters
        for shape, o, w in zip(plan.shapes, plan.heads, plan.widths, strict=True)
    ]


@pytest.mark.parametrize("fields", [{}, {"targets": "ffn"}, {"skip_first": 1, "ratio": 0.15}])
def test_each_layer_is_equally_far_from_its_place_between_the_prices_and_the_log_schedule(dense, tiny_config, fields):
    config = tiny_config(schedule="nats", head_price_factor=1e9, **fields)
    job, alone = chosen(dense, replace(config, log_share=0.0))
    by_prices, sizes = gone(alone), [shape.parameters for shape in job.shapes]
    ratios = layer_ratios(replace(config, schedule="log", first_ratio_share=0.0), sizes)
    step = config.ffn_multiple * job.shapes[0].channel_parameters
    for first in (0.0, 0.5, 1.0):
        drawn = gone(chosen(dense, replace(config, log_share=first))[1])
        assert config.ratio * sum(sizes) <= sum(drawn) < config.ratio * sum(sizes) + step
        shares = [first, first * 2 / 3, first / 3, 0.0]
        off = [
            reached - (1 - share) * a - share * ratio * size
            for reached, share, a, ratio, size in zip(drawn, shares, by_prices, ratios, sizes, strict=True)
        ][config.skip_first :]
        assert max(off) - min(off) <= step
    assert drawn != by_prices


def test_a_first_layer_whose_heads_take_more_than_its_place_keeps_its_ffn(dense, tiny_config):
    config = tiny_config(schedule="nats", ratio=0.4, head_price_factor=1e-9)
    _, drawn = chosen(dense, config)
    heads = [
        shape.heads.parameters - shape.heads.cost(o.num_heads, o.num_kv_heads)
        for shape, o in zip(drawn.shapes, drawn.heads, strict=True)
    ]
    sizes = [shape.parameters for shape in drawn.shapes]
    assert heads[0] > layer_ratios(replace(config, schedule="log", first_ratio_share=0.0), sizes)[0] * sizes[0]
    assert drawn.widths[0] == drawn.shapes[0].intermediate_size
    assert sum(gone(drawn)) >= 0.4 * sum(sizes)
