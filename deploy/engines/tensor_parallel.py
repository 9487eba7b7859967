"""Which tensor-parallel sizes a checkpoint can be served with: every rank gets an equal part of every layer."""

from pathlib import Path
from typing import Any

from slimgpt.checkpoints.families import FAMILIES, layer_shapes
from slimgpt.checkpoints.headers import raw_config
from slimgpt.checkpoints.origins import read_config
from slimgpt.method.shapes import LayerShape


def _group(config: Any) -> int:
    """Weights of a row that share a scale and stay together on one rank; 1 where the model is not quantised so."""
    groups = (getattr(config, "quantization_config", None) or {}).get("config_groups", {})
    return max((group["weights"].get("group_size") or 1 for group in groups.values()), default=1)


def _obstacle(shape: LayerShape, size: int, group: int) -> str:
    if shape.num_heads % size:
        return f"{shape.num_heads} heads"
    if shape.num_kv_heads % size and size % shape.num_kv_heads:  # fewer kv heads than ranks are copied
        return f"{shape.num_kv_heads} kv heads"
    if shape.intermediate_size % size:
        return f"an FFN width of {shape.intermediate_size}"
    columns = shape.num_heads * shape.head_dim
    if size > 1 and columns % (size * group):
        return f"{columns} columns of heads in groups of {group}"
    if size > 1 and shape.intermediate_size % (size * group):
        return f"an FFN width of {shape.intermediate_size} in groups of {group}"
    return ""


def tensor_parallel_sizes(config: Any, largest: int = 16) -> list[int]:
    """The sizes up to ``largest`` that divide every layer of a model with this config."""
    shapes, group = layer_shapes(config), _group(config)
    return [size for size in range(1, largest + 1) if not any(_obstacle(shape, size, group) for shape in shapes)]


def check_tensor_parallel(config: Any, size: int) -> None:
    """Refuse a size that does not divide every layer.

    Raises:
        ValueError: naming the first layer that stands in the way, the sizes that work, and the remedy.
    """
    for i, shape in enumerate(layer_shapes(config)):
        if obstacle := _obstacle(shape, size, _group(config)):
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
    return read_config(model)
