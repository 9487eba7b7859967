"""Groups fit the input of every projection, and the reason why none is larger names what does not fit."""

import pytest

from slimgpt.method.shapes import LayerShape
from slimgpt.quantization.sizes import fitting_group, matrices, misfit, stored_bytes


def shapes(hidden_size=576, heads=9, kv_heads=3, head_dim=64, widths=(1536, 1152)):
    return [LayerShape(hidden_size, heads, kv_heads, head_dim, width) for width in widths]


@pytest.mark.parametrize(
    ("layers", "group", "reason"),
    [
        (shapes(hidden_size=4096, heads=32, head_dim=128, widths=(11008, 9600)), 128, ""),
        (shapes(), 64, "128 does not divide hidden_size 576"),  # SmolLM2
        (shapes(hidden_size=512, heads=3), 64, "128 does not divide the 192 columns of layer 0's heads"),
        (
            shapes(hidden_size=512, heads=4, widths=(1536, 1184)),
            32,
            "64 does not divide layer 1's FFN width 1184; --ffn-multiple 64 would let it",
        ),
        (
            shapes(hidden_size=512, heads=4, widths=(1528, 1024)),
            0,
            "32 does not divide layer 0's FFN width 1528; --ffn-multiple 32 would let it",
        ),
    ],
)
def test_the_largest_group_that_divides_every_input_is_taken(layers, group, reason):
    assert fitting_group(layers) == group
    assert misfit(layers, group) == reason


def test_a_group_that_does_not_fit_is_refused_with_the_largest_that_does():
    assert fitting_group(shapes(), 32) == 32
    with pytest.raises(ValueError, match="does not divide layer 0's hidden_size of 576; the largest that fits is 64"):
        fitting_group(shapes(), 128)


def test_the_seven_projections_hold_the_layers_parameters():
    for shape in shapes():
        assert sum(rows * columns for rows, columns in matrices(shape)) == shape.parameters


def test_four_bits_with_scales_of_sixteen_and_zero_points_of_four_take_a_quarter_and_a_little():
    (shape, _) = shapes()
    groups = shape.parameters // 64
    assert stored_bytes(shape, 4, 64, 2) == shape.parameters // 2 + 2 * groups + groups // 2 + 7 * 16
    rows = sum(rows for rows, _ in matrices(shape))
    assert stored_bytes(shape, 8, 0, 2) == shape.parameters + 2 * rows
