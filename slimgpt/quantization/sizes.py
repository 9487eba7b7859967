"""What is stored for the projections of a layer: groups that fit their inputs, and bytes.

Letters: D = hidden size, A = heads * head_dim, F = FFN width.
"""

from collections.abc import Iterator

from slimgpt.checkpoints.weight_files import PER_INT32
from slimgpt.method.shapes import LayerShape

GROUPS = (128, 64, 32)
WHOLE_ROW = 0
_SHAPE = 16  # bytes: rows and columns beside packed weights


def inputs(shape: LayerShape) -> tuple[int, int, int]:
    """D, A and F: how many numbers go into q, k, v, gate and up; into o; into down."""
    return shape.hidden_size, shape.num_heads * shape.head_dim, shape.intermediate_size


def matrices(shape: LayerShape) -> Iterator[tuple[int, int]]:
    """Rows and columns of the seven projections."""
    hidden, query, channels = inputs(shape)
    kv = shape.num_kv_heads * shape.head_dim
    yield from ((query, hidden), (kv, hidden), (kv, hidden), (hidden, query))
    yield from ((channels, hidden), (channels, hidden), (hidden, channels))


def fitting_group(shapes: list[LayerShape], wanted: int = 0) -> int:
    """Weights of a row that share a scale: ``wanted``, or the largest of GROUPS that fits; else WHOLE_ROW.

    Raises:
        ValueError: where ``wanted`` does not divide the input of a projection, naming it.
    """
    if wanted:
        for i, shape in enumerate(shapes):
            for name, width in zip(("hidden_size", "heads x head_dim", "FFN width"), inputs(shape), strict=True):
                if width % wanted:
                    raise ValueError(
                        f"group_size is {wanted}, which does not divide layer {i}'s {name} of {width}; "
                        f"the largest that fits is {fitting_group(shapes) or 'an entire row'}: leave group_size out"
                    )
        return wanted
    widths = {width for shape in shapes for width in inputs(shape)}
    return next((group for group in GROUPS if all(width % group == 0 for width in widths)), WHOLE_ROW)


def check_packing(shapes: list[LayerShape]) -> None:
    """Refuse widths of which eight 4-bit numbers do not fill a whole number of integers.

    Raises:
        ValueError: naming the layer, the width and the remedy.
    """
    for i, shape in enumerate(shapes):
        for width in inputs(shape):
            if width % PER_INT32:
                raise ValueError(
                    f"w4a16 packs {PER_INT32} weights into an integer, which does not divide layer {i}'s width of "
                    f"{width}; prune with --ffn-multiple {GROUPS[-1]}, or take w8a8"
                )


def misfit(shapes: list[LayerShape], group: int) -> str:
    """Why no larger group fits, in a few words; empty for the largest of GROUPS."""
    larger = [size for size in GROUPS if size > group]
    if not larger:
        return ""
    size = larger[-1]
    for i, shape in enumerate(shapes):
        hidden, query, channels = inputs(shape)
        if hidden % size:
            return f"{size} does not divide hidden_size {hidden}"
        if query % size:
            return f"{size} does not divide the {query} columns of layer {i}'s heads"
        if channels % size:
            return f"{size} does not divide layer {i}'s FFN width {channels}; --ffn-multiple {size} would let it"
    return ""


def stored_bytes(shape: LayerShape, bits: int, group: int, scale: int) -> int:
    """Bytes of a layer's quantised projections with their scales of ``scale`` bytes each, without biases.

    With 4 bits there are also their zero points, as many bits, eight rows' in an integer.
    """
    total = 0
    for rows, columns in matrices(shape):
        groups = columns // group if group else 1
        total += rows * columns * bits // 8 + scale * rows * groups
        total += 4 * groups * -(-rows // PER_INT32) + _SHAPE if bits == 4 else 0
    return total
