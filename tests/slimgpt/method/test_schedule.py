"""Layer ratios: their mean, their shape, the paper's figures, and rounding that the next layer makes up for."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimgpt.config import MAX_RATIO, PruneConfig, paper_preset
from slimgpt.method.schedule import Budget, layer_ratios


@given(
    ratio=st.floats(0, MAX_RATIO),
    share=st.floats(0, 1),
    layers=st.integers(1, 80),
    schedule=st.sampled_from(["log", "linear", "uniform"]),
)
def test_the_mean_is_the_ratio_and_no_layer_passes_the_cap(ratio, share, layers, schedule):
    ratios = layer_ratios(PruneConfig(ratio=ratio, schedule=schedule, first_ratio_share=share), [7] * layers)
    assert sum(ratios) / layers == pytest.approx(ratio, abs=1e-9)
    assert all(-1e-9 <= r <= MAX_RATIO + 1e-9 for r in ratios)
    assert all(b >= a - 1e-12 for a, b in pairwise(ratios))


@pytest.mark.parametrize(("ratio", "first", "last"), [(0.20, 0.0625, 0.25), (0.50, 0.125, 0.656)])
def test_the_papers_layer_ratios_for_32_layers(ratio, first, last):
    """Section 4 and figure 4 give r_0 and r_31: from r_0 the closed form lands on r_31, within rounding to heads."""
    ratios = layer_ratios(PruneConfig(**paper_preset(ratio)), [9] * 32)
    assert ratios[0] == pytest.approx(first)
    assert ratios[-1] == pytest.approx(last, abs=1 / 32)


@given(ratio=st.floats(0.05, 0.5), sizes=st.lists(st.integers(80, 120), min_size=2, max_size=40))
def test_layers_of_different_size_lose_the_ratio_together(ratio, sizes):
    ratios = layer_ratios(PruneConfig(ratio=ratio), sizes)
    assert sum(r * size for r, size in zip(ratios, sizes, strict=True)) / sum(sizes) == pytest.approx(ratio)


def test_skipped_layers_get_nothing_and_the_others_carry_their_share():
    ratios = layer_ratios(PruneConfig(ratio=0.3, skip_first=2, skip_last=1), [1] * 10)
    assert ratios[:2] == [0, 0]
    assert ratios[-1] == 0
    assert sum(ratios) / 10 == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (PruneConfig(ratio=0.5, skip_first=6, skip_last=4), 10, "leave no layer of 10"),
        (PruneConfig(ratio=0.5, skip_first=6), 10, "the limit is 0.9"),
        (PruneConfig(ratio=0.5, schedule="explicit", layer_ratios=(0.5, 0.5)), 3, "2 entries; the model has 3 layers"),
        (
            PruneConfig(ratio=0.4, schedule="explicit", layer_ratios=(0.5, 0.5)),
            2,
            "layer_ratios remove 0.5000; ratio is 0.4",
        ),
    ],
)
def test_impossible_schedules_are_refused_with_both_values(config, layers, message):
    with pytest.raises(ValueError, match=message):
        layer_ratios(config, [5] * layers)


@given(
    ratio=st.floats(0.05, 0.6), multiple=st.sampled_from([1, 32, 64, 128]), width=st.sampled_from([1536, 1000, 11008])
)
def test_rounding_is_carried_so_that_the_total_holds(ratio, multiple, width):
    """Heads give up all or nothing: the FFN makes up for it, within half a multiple over the whole model."""
    config = PruneConfig(ratio=ratio, schedule="uniform", ffn_multiple=multiple)
    budget, channel, attention, removed_all = Budget(config), 3 * 576, 884_736, 0
    layer = attention + channel * width
    for i in range(24):
        allowed = budget.heads(ratio, attention, layer)
        removed = 294_912 if i % 2 and allowed >= 294_912 else 0
        kept = budget.ffn_width(ratio, layer, removed, channel, width)
        assert kept == width or kept % multiple == 0
        assert 0 < kept <= width
        removed_all += removed + (width - kept) * channel
    assert removed_all / (24 * layer) == pytest.approx(ratio, abs=0.005)


def test_targets_keep_the_other_half_whole():
    ffn, attention = Budget(PruneConfig(targets="ffn")), Budget(PruneConfig(targets="attention"))
    assert ffn.heads(0.5, 100, 400) == 0
    assert attention.heads(0.25, 200, 400) == 100
    assert attention.ffn_width(0.25, 400, 100, 3, 128) == 128
