"""Ratios, prices, limits and rounding: the total is met, bounds hold, and a layer with ratio 0 is unchanged."""

import math
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from slimgpt.config import MAX_RATIO, PruneConfig, paper_preset
from slimgpt.method.allocation import Allocation, layer_ratios, planned_shapes, width_bounds
from slimgpt.method.selection import HeadPath, HeadStep
from slimgpt.method.shapes import LayerShape

by_log = partial(PruneConfig, schedule="log")
FALLING = {"log_decreasing": "log", "linear_decreasing": "linear"}  # and what each is in reverse


@given(
    ratio=st.floats(0, MAX_RATIO),
    share=st.floats(0, 1),
    layers=st.integers(1, 80),
    schedule=st.sampled_from(["log", "linear", "uniform", *FALLING]),
)
def test_the_mean_equals_the_ratio_and_no_layer_exceeds_the_cap(ratio, share, layers, schedule):
    ratios = layer_ratios(PruneConfig(ratio=ratio, schedule=schedule, first_ratio_share=share), [7] * layers)
    assert sum(ratios) / layers == pytest.approx(ratio, abs=1e-9)
    assert all(-1e-9 <= r <= MAX_RATIO + 1e-9 for r in ratios)
    rising = ratios[::-1] if schedule in FALLING else ratios
    assert all(b >= a - 1e-12 for a, b in pairwise(rising))


@pytest.mark.parametrize(("ratio", "first", "last"), [(0.20, 0.0625, 0.25), (0.50, 0.125, 0.656)])
def test_the_papers_layer_ratios_for_32_layers(ratio, first, last):
    """Section 4 and figure 4 give r_0 and r_31: from r_0 the closed form lands on r_31, within rounding to heads."""
    ratios = layer_ratios(PruneConfig(**paper_preset(ratio)), [9] * 32)
    assert ratios[0] == pytest.approx(first)
    assert ratios[-1] == pytest.approx(last, abs=1 / 32)


@given(
    ratio=st.floats(0.05, 0.5),
    sizes=st.lists(st.integers(80, 120), min_size=2, max_size=40),
    schedule=st.sampled_from(["log", *FALLING]),
)
def test_layers_of_different_sizes_meet_the_ratio_in_total(ratio, sizes, schedule):
    ratios = layer_ratios(PruneConfig(ratio=ratio, schedule=schedule), sizes)
    assert sum(r * size for r, size in zip(ratios, sizes, strict=True)) / sum(sizes) == pytest.approx(ratio)


@given(
    ratio=st.floats(0.05, 0.6),
    share=st.floats(0, 1),
    sizes=st.lists(st.integers(60, 140), min_size=4, max_size=40),
    skip=st.integers(0, 1),
    schedule=st.sampled_from(list(FALLING)),
)
def test_a_falling_schedule_is_the_rising_one_of_the_model_upside_down(ratio, share, sizes, skip, schedule):
    """Sizes and skipped layers turned, too: ratios solved for other sizes and then reversed would miss the total."""
    fields = {"ratio": ratio, "first_ratio_share": share}
    try:
        rising = layer_ratios(PruneConfig(schedule=FALLING[schedule], skip_last=skip, **fields), sizes[::-1])
    except ValueError:
        reject()
    falling = layer_ratios(PruneConfig(schedule=schedule, skip_first=skip, **fields), sizes)
    assert falling == pytest.approx(rising[::-1])


@pytest.mark.parametrize("schedule", FALLING)
def test_a_falling_schedule_leaves_skipped_layers_alone_and_begins_low_in_the_last_that_is_not(schedule):
    config = PruneConfig(ratio=0.3, schedule=schedule, skip_first=2, skip_last=1, first_ratio_share=0.5)
    ratios = layer_ratios(config, [1] * 10)
    assert (ratios[:2], ratios[-1]) == ([0, 0], 0)
    assert ratios[-2] == pytest.approx(0.5 * 3 / 7)  # of the mean of those that carry it
    assert ratios[2] == max(ratios)
    assert sum(ratios) / 10 == pytest.approx(0.3)


def test_the_falling_curves_in_figures():
    """Three equal layers, nothing from the last: ln 3 : ln 2 : 0, and 2 : 1 : 0."""
    log_curve, linear = (
        layer_ratios(PruneConfig(ratio=0.3, schedule=name, first_ratio_share=0), [1] * 3) for name in FALLING
    )
    assert log_curve == pytest.approx([0.9 * math.log(3) / math.log(6), 0.9 * math.log(2) / math.log(6), 0])
    assert linear == pytest.approx([0.6, 0.3, 0])


def test_skipped_layers_lose_nothing_and_the_others_compensate():
    ratios = layer_ratios(by_log(ratio=0.3, skip_first=2, skip_last=1), [1] * 10)
    assert ratios[:2] == [0, 0]
    assert ratios[-1] == 0
    assert sum(ratios) / 10 == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (by_log(ratio=0.5, skip_first=6, skip_last=4), 10, "leave no layer of 10"),
        (by_log(ratio=0.5, skip_first=6), 10, "the limit is 0.9"),
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


SMOL = LayerShape(hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536)


def path(shape, *steps, broken=False):
    """A path of removals (heads, kv heads, error), such as ``(1, 1, 0.5)``; which heads they are does not matter."""
    head_steps, heads, kv_heads = [], iter(range(shape.num_heads)), iter(range(shape.num_kv_heads))
    for count, kv_count, error in steps:
        taken = tuple(next(heads) for _ in range(count)), tuple(next(kv_heads) for _ in range(kv_count))
        head_steps.append(HeadStep(*taken, shape.heads.cost(count, kv_count), error))
    return HeadPath(shape.heads, tuple(head_steps), broken, "layer 0, o_proj")


@given(
    ratio=st.floats(0.05, 0.6), multiple=st.sampled_from([1, 32, 64, 128]), width=st.sampled_from([1536, 1000, 11008])
)
def test_rounding_is_carried_so_that_the_total_ratio_is_met(ratio, multiple, width):
    """Heads lose all or nothing: the FFN compensates, within half a multiple over the entire model."""
    config = PruneConfig(ratio=ratio, schedule="uniform", ffn_multiple=multiple)
    shape = replace(SMOL, intermediate_size=width)
    allocation, shapes = Allocation(config, [shape] * 24), []
    for i in range(24):
        heads, kv_heads = (6, 2) if i % 2 and allocation.head_limit(i) >= shape.heads.cost(3, 1) else (9, 3)
        kept = allocation.ffn_width(i, heads, kv_heads)
        assert kept == width or kept % multiple == 0
        assert 0 < kept <= width
        shapes.append(replace(shape, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=kept))
        allocation.settle(i, shapes[-1])
    assert 1 - sum(s.parameters for s in shapes) / (24 * shape.parameters) == pytest.approx(ratio, abs=0.005)


def test_units_outside_targets_are_not_pruned():
    ffn = Allocation(by_log(ratio=0.5, targets="ffn"), [SMOL] * 2)
    attention = Allocation(PruneConfig(ratio=0.1, targets="attention", schedule="uniform"), [SMOL] * 2)
    assert ffn.head_limit(1) == 0
    assert attention.head_limit(0) == pytest.approx(0.1 * SMOL.parameters)
    assert attention.ffn_width(0, 6, 2) == 1536


@pytest.mark.parametrize("targets", ["all", "attention", "ffn"])
@pytest.mark.parametrize("unit", ["auto", "kv_group", "query"])
@pytest.mark.parametrize("budget", ["price", "ratio"])
def test_a_layer_with_ratio_0_is_unchanged_in_every_combination(targets, unit, budget):
    """Heads alone, with the last two layers skipped, once left 1 of 32 heads in both, to compensate for the others."""
    shape = LayerShape(hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=11008)
    config = by_log(
        ratio=0.08, skip_first=1, skip_last=2, targets=targets, head_unit=unit, head_budget=budget, ffn_multiple=64
    )
    shapes = planned_shapes(config, [shape] * 32)
    for i in (0, 30, 31):
        assert shapes[i] == shape
        assert width_bounds(config, [shape] * 32)[i] == (shape, shape)
    allocation = Allocation(config, [shape] * 32)
    allocation.settle(29, replace(shape, intermediate_size=11008))  # nothing went, all is carried on
    assert not allocation.heads_may_go(30)
    assert allocation.ffn_width(30, 32, 8) == 11008


def test_heads_above_the_price_are_kept_unless_needed_and_the_first_layer_has_no_price():
    allocation = Allocation(PruneConfig(ratio=0.3, schedule="uniform"), [SMOL] * 3)
    assert not allocation.heads_may_go(0)
    allocation.settle(0, replace(SMOL, intermediate_size=1088), ffn_price=2.0)
    assert allocation.heads_may_go(1)
    unit = SMOL.heads.cost(3, 1)
    cheap, dear = (3, 1, 1.9 * unit), (3, 1, 2.1 * unit)
    assert allocation.cut_heads(1, path(SMOL, cheap, dear)) == 1
    assert allocation.cut_heads(1, path(SMOL, dear, cheap)) == 0
    assert allocation.cut_heads(1, path(SMOL, cheap), gain=1.1) == 0  # behind a norm that makes it larger
    forced = Allocation(PruneConfig(ratio=0.75, schedule="uniform"), [SMOL])  # more than the FFN has
    assert forced.heads_may_go(0)
    assert forced.cut_heads(0, path(SMOL, dear, dear)) == 1


def test_without_a_price_the_full_path_is_used_and_a_broken_one_is_refused():
    allocation = Allocation(by_log(ratio=0.3, head_budget="ratio"), [SMOL] * 3)
    assert allocation.cut_heads(2, path(SMOL, (3, 1, 1e9))) == 1
    with pytest.raises(ValueError, match="layer 0, o_proj: too ill-conditioned to compare units: raise percdamp"):
        allocation.cut_heads(2, path(SMOL, (3, 1, 1.0), broken=True))
    priced = Allocation(PruneConfig(ratio=0.3, schedule="uniform"), [SMOL] * 3)
    priced.settle(0, SMOL, ffn_price=2.0)
    assert priced.cut_heads(1, path(SMOL, (3, 1, 1e9), broken=True)) == 0  # never needed that far


@given(
    ratio=st.floats(0.02, 0.7),
    targets=st.sampled_from(["all", "attention", "ffn"]),
    unit=st.sampled_from(["auto", "kv_group", "query"]),
    budget=st.sampled_from(["price", "ratio"]),
    schedule=st.sampled_from(["log", "uniform", "linear_decreasing"]),
    multiple=st.sampled_from([1, 64, 100]),
    skip=st.integers(0, 2),
    shape=st.sampled_from([SMOL, replace(SMOL, num_heads=8, num_kv_heads=8), replace(SMOL, num_heads=12)]),
    seed=st.integers(0, 10**6),
)
def test_widths_stay_within_the_bounds_for_any_data(
    ratio, targets, unit, budget, schedule, multiple, skip, shape, seed
):
    """Random data: any unit that fits at every step of a path, and any cut where heads have a price."""
    draw, layers = random.Random(seed), 8
    try:
        config = PruneConfig(
            **{"ratio": ratio, "targets": targets, "head_unit": unit, "head_budget": budget, "schedule": schedule},
            ffn_multiple=multiple,
            skip_last=skip,
        )
        planned = planned_shapes(config, [shape] * layers)
    except ValueError:
        reject()  # refused before any work
    allocation, bounds = Allocation(config, [shape] * layers), width_bounds(config, [shape] * layers)
    priced = budget == "price" and targets == "all"
    for i, (least, most) in enumerate(bounds):
        left, limit = shape.heads, allocation.head_limit(i)
        while units := [u for u in left.units(unit, 1) if left.cost(*u) <= limit]:
            if priced and draw.random() < 0.5:
                break
            taken = draw.choice(units)
            limit -= left.cost(*taken)
            left = replace(left, num_heads=left.num_heads - taken[0], num_kv_heads=left.num_kv_heads - taken[1])
        width = allocation.ffn_width(i, left.num_heads, left.num_kv_heads)
        after = replace(shape, num_heads=left.num_heads, num_kv_heads=left.num_kv_heads, intermediate_size=width)
        allocation.settle(i, after, ffn_price=1.0)
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            low, high = getattr(least, name), getattr(most, name)
            assert low <= getattr(after, name) <= high, (i, name)
            assert low <= getattr(planned[i], name) <= high, (i, name)


@pytest.mark.parametrize(("unit", "targets"), [("kv_group", "all"), ("query", "all"), ("auto", "ffn")])
def test_with_only_one_kind_of_unit_the_bounds_equal_the_plan(unit, targets):
    config = by_log(ratio=0.37, head_unit=unit, targets=targets, head_budget="ratio")
    shapes = planned_shapes(config, [SMOL] * 12)
    assert width_bounds(config, [SMOL] * 12) == [(shape, shape) for shape in shapes]


def test_an_unreachable_ratio_is_refused_with_the_reachable_one():
    with pytest.raises(ValueError, match=r"ratio 0\.1 cannot be met: .* multiples of 1024 give 0\.0"):
        planned_shapes(PruneConfig(ratio=0.1, ffn_multiple=1024, targets="ffn", schedule="uniform"), [SMOL])


def test_skipped_layers_take_up_the_layouts_that_may_differ_and_it_is_said_before_prices_are_made():
    shapes = [LayerShape(hidden_size=64, num_heads=8, num_kv_heads=4, head_dim=16, intermediate_size=256)] * 3
    few = PruneConfig(ratio=0.6, skip_first=1, max_head_shapes=1, ffn_multiple=8)
    with pytest.raises(
        ValueError, match=r"ratio 0.6 cannot be met: the fewest heads .* give 0.431; .*raise max_head_shapes$"
    ):
        planned_shapes(few, shapes)
    assert [least.num_heads for least, _ in width_bounds(replace(few, ratio=0.4), shapes)] == [8, 8, 8]
    planned_shapes(replace(few, max_head_shapes=2), shapes)
    planned_shapes(replace(few, skip_first=0), shapes)
