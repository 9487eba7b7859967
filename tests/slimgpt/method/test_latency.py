"""A table of milliseconds gives back the times it was measured from, and those of widths in between."""

from dataclasses import replace

import pytest

from slimgpt.method.latency import LatencyTable, probe_shapes
from slimgpt.method.shapes import LayerShape

SHAPE = LayerShape(hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536)
LAYERS, FLOOR = 30, 2500.0


def milliseconds(shape: LayerShape) -> float:
    """Of a model whose layers are all so; its FFN pays for tiles of 512 channels."""
    return FLOOR + LAYERS * (3 * shape.num_heads + 5 * shape.num_kv_heads + 40 * -(-shape.intermediate_size // 512))


def table_of(shape=SHAPE, time=milliseconds, *, heads=True) -> LatencyTable:
    probes = [(probe, time(probe)) for probe in probe_shapes(shape, heads=heads)]
    return LatencyTable.of(shape, LAYERS, time(shape), probes, {})


def test_it_gives_back_the_times_that_it_was_measured_from():
    table = table_of()
    assert (table.head_ms, table.kv_head_ms) == (pytest.approx(3), pytest.approx(5))
    for probe in probe_shapes(SHAPE, heads=True):
        assert table.speedup([probe] * LAYERS) == pytest.approx(milliseconds(SHAPE) / milliseconds(probe), rel=1e-5)
    mixed = [replace(SHAPE, num_heads=6)] * 10 + [replace(SHAPE, num_heads=2, num_kv_heads=1)] * 20
    took = FLOOR + 10 * (18 + 15 + 120) + 20 * (6 + 5 + 120)
    assert table.speedup(mixed) == pytest.approx(milliseconds(SHAPE) / took, rel=1e-5)


def test_a_staircase_of_widths_is_kept_and_never_falls():
    """1152, 768 and 384 channels pay for three, two and one tile."""
    table = table_of()
    dense = table.ffn_us(1536)
    assert [round((dense - table.ffn_us(width)) / 1000) for width in (1152, 768, 384)] == [0, 40, 80]
    assert table.ffn_us(576) == pytest.approx((table.ffn_us(384) + table.ffn_us(768)) / 2, abs=1)
    assert table.ffn_us(0) == 0
    noisy = table_of(time=lambda shape: milliseconds(shape) + 3000 * (shape.intermediate_size == 768))
    times = [noisy.ffn_us(width) for width in range(0, 1537, 64)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "probed"),
    [(8, 8, [(4, 4)]), (8, 1, [(4, 1)]), (9, 3, [(3, 3), (3, 1)]), (1, 1, [])],
)
def test_heads_are_measured_as_far_as_they_differ(heads, kv_heads, probed):
    shape = replace(SHAPE, num_heads=heads, num_kv_heads=kv_heads)
    probes = [probe for probe in probe_shapes(shape, heads=True) if probe.intermediate_size == 1536]
    assert [(probe.num_heads, probe.num_kv_heads) for probe in probes] == probed
    table = table_of(shape)
    for probe in probes:
        assert table.speedup([probe] * LAYERS) == pytest.approx(milliseconds(shape) / milliseconds(probe), rel=1e-5)
    assert all(probe.num_heads == heads for probe in probe_shapes(shape, heads=False))


def test_an_ffn_that_saves_nothing_is_refused():
    with pytest.raises(ValueError, match="FFNs of 384 channels is not faster here than one with 1536"):
        table_of(time=lambda shape: 1000.0 - shape.intermediate_size)


def test_it_comes_back_from_json():
    table = table_of()
    assert LatencyTable.from_dict(table.to_dict()) == table
    assert table.digest() != replace(table, head_ms=4.0).digest()
