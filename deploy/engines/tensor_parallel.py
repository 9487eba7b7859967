"""Which tensor-parallel sizes a checkpoint can be served with: every rank gets an equal part of every layer."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

import slimgpt.modeling  # noqa: F401  makes transformers know pruned checkpoints
from slimgpt.checkpoints.families import FAMILIES, layer_shapes
from slimgpt.checkpoints.headers import raw_config
from slimgpt.method.shapes import LayerShape


def _obstacle(shape: LayerShape, size: int) -> str:
    if shape.num_heads % size:
        return f"{shape.num_heads} heads"
    if shape.num_kv_heads % size and size % shape.num_kv_heads:  # fewer kv heads than ranks are copied
        return f"{shape.num_kv_heads} kv heads"
    if shape.intermediate_size % size:
        return f"an FFN width of {shape.intermediate_size}"
    return ""


def tensor_parallel_sizes(config: Any, largest: int = 16) -> list[int]:
    """The sizes up to ``largest`` that divide every layer of a model with this config."""
    shapes = layer_shapes(config)
    return [size for size in range(1, largest + 1) if not any(_obstacle(shape, size) for shape in shapes)]


def check_tensor_parallel(config: Any, size: int) -> None:
    """Refuse a size that does not divide every layer.

    Raises:
        ValueError: naming the first layer that stands in the way, the sizes that work, and the remedy.
    """
    for i, shape in enumerate(layer_shapes(config)):
        if obstacle := _obstacle(shape, size):
            sizes = ", ".join(map(str, tensor_parallel_sizes(config)))
            raise ValueError(
                f"layer {i} has {obstacle}, which tensor parallel size {size} does not divide; sizes that work: "
                f"{sizes}. To serve with {size}, prune with --head-multiple {size} and an --ffn-multiple it divides"
            )


def family_config(model: Path) -> Any:
    """The config of a checkpoint of a family of ours, dense or pruned; None for others, about which vLLM decides."""
    name = raw_config(model).get("model_type")
    if not any(name in (family.model_type, family.slim) for family in FAMILIES):
        return None
    return AutoConfig.from_pretrained(model, trust_remote_code=False)
