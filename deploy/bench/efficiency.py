"""How much of the time that a pruned model could save it does save.

What is counted, of requests with ``I`` prompt and ``O`` answer tokens, for the whole model, embeddings included:

- operations: two per weight and token of the projections (``I + O - 1`` tokens pass the layers) and of the output head
  (``O`` tokens), and four per head dimension, query head and pair of tokens that attend to each other;
- bytes: the weights of the layers and of the head once per step (``O`` steps, in which ``batch`` requests go together),
  and for each step after the first the keys and values of all tokens before it. Quantised weights count as stored.

Norms, activations, softmax, sampling and everything that the server does beside the model are not counted: what they
cost shows as efficiency below 1. Which of the two resources is scarce depends on the machine, so the pruned model is
held to the larger share. It is the stricter choice: a machine short of the other resource could never save as much.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from deploy.bench.results import Ratio, Saving
from slimgpt.checkpoints.families import layer_shapes
from slimgpt.checkpoints.headers import header
from slimgpt.checkpoints.origins import read_config
from slimgpt.checkpoints.weight_files import weight_files
from slimgpt.method.shapes import LayerShape


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one batch of requests."""

    operations: float
    bytes: float


def work_of(model: Path, *, input_len: int, output_len: int, batch: int, itemsize: int = 2) -> Work:
    """What a batch of requests asks of ``model``.

    Args:
        model: a checkpoint's folder, dense or pruned.
        input_len: prompt tokens of each request.
        output_len: answer tokens of each request.
        batch: requests computed together.
        itemsize: bytes of a key or a value, and of a weight that is not quantised.
    """
    config = read_config(model)
    shapes = layer_shapes(config)
    head = config.vocab_size * config.hidden_size
    weights = sum(shape.parameters for shape in shapes)
    passed = input_len + output_len - 1  # the last answer token is never fed back
    attended = passed * (passed + 1) // 2  # causal: token t attends to t + 1 tokens
    read_back = sum(range(input_len + 1, passed + 1))  # tokens whose keys and values the steps after the first read
    operations = 2 * weights * passed + 2 * head * output_len + 4 * attended * sum(map(_query_width, shapes))
    kv_bytes = 2 * itemsize * read_back * sum(shape.num_kv_heads * shape.head_dim for shape in shapes)
    layers = _stored_bytes(model) if getattr(config, "quantization_config", None) else itemsize * weights
    return Work(batch * operations, (layers + itemsize * head) * output_len + batch * kv_bytes)


def _stored_bytes(model: Path) -> int:
    """Of the projections and their scales, from the files' headers."""
    stored = (entry for name in weight_files(model) for entry in header(model / name).items())
    return sum(
        math.prod(shape) * int("".join(filter(str.isdigit, dtype.partition("_")[0]))) // 8  # such as BF16, F8_E4M3
        for name, (shape, dtype, _) in stored
        if ".layers." in name and len(shape) == 2
    )


def _query_width(shape: LayerShape) -> int:
    return shape.num_heads * shape.head_dim


def saving(dense: Work, pruned: Work, speedups: list[float]) -> Saving | None:
    """How ``speedups``, one per pair (2 is twice as fast), compare with the work that is left.

    None where the pruned model needs no less than the dense one.
    """
    operations, read = 1 - pruned.operations / dense.operations, 1 - pruned.bytes / dense.bytes
    possible = max(operations, read)
    if possible <= 0:
        return None
    saved = [1 - 1 / speedup for speedup in speedups]
    return Saving(operations, read, Ratio.of(saved), Ratio.of([share / possible for share in saved]))
