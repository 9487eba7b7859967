"""The checkpoint that comes out: names of its shards, its config, and the step that completes it."""

import hashlib
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from slimgpt import modeling
from slimgpt.checkpoints.families import Family
from slimgpt.checkpoints.headers import CONFIG, INDEX
from slimgpt.checkpoints.lineage import LINEAGE, Lineage
from slimgpt.files import json_bytes, write_atomically
from slimgpt.method.shapes import LayerShape, Unit
from slimgpt.report import REPORT, PruneReport


def shard_name(index: int, num_layers: int) -> str:
    """Shard 0 holds the embeddings, 1 to n a layer each, n + 1 the rest."""
    return f"model-{index + 1:05d}-of-{num_layers + 2:05d}.safetensors"


def pruned_config(dense: PretrainedConfig, family: Family, shapes: list[LayerShape]) -> dict[str, Any]:
    """config.json of the pruned model.

    The stock architecture where all layers are equal and it allows their widths, else the per-layer form, which names
    the code that defines it.
    """
    data = dense.to_dict()
    for key in ("per_layer_config", "auto_map", "architectures", "model_type", "_name_or_path"):
        data.pop(key, None)
    first = shapes[0]
    # LlamaConfig and others refuse other head counts even where head_dim is given; per-layer configs are not checked
    # this way. Where the config knows no head_dim, vLLM takes it to be hidden_size / num_attention_heads.
    known = family.has_head_dim or first.num_heads * first.head_dim == first.hidden_size
    if all(shape == first for shape in shapes) and first.hidden_size % first.num_heads == 0 and known:
        stock = {"model_type": family.model_type, "architectures": [family.stock_class]}
        return {**data, **first.overrides, "head_dim": first.head_dim, **stock}
    return {
        **data,
        "head_dim": first.head_dim,
        "model_type": family.slim,
        "architectures": [family.slim_class("ForCausalLM")],
        "auto_map": {
            "AutoConfig": f"{family.slim}.{family.slim_class('Config')}",
            "AutoModel": f"{family.slim}.{family.slim_class('Model')}",
            "AutoModelForCausalLM": f"{family.slim}.{family.slim_class('ForCausalLM')}",
        },
        "per_layer_config": {f"{i:0{len(str(len(shapes)))}d}": shape.overrides for i, shape in enumerate(shapes)},
    }


def slice_rows(
    tensors: dict[str, Tensor], family: Family, dense: LayerShape, kept: dict[Unit, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one layer without the rows of what is gone: sliced away, never just zeroed.

    Args:
        tensors: of the dense layer, names relative to it.
        family: which projections lose rows.
        dense: the layer's widths.
        kept: for each unit the rows of a block that stay.
    """
    sliced = dict(tensors)
    for projection, units in family.rows.items():
        starts = [0, *accumulate(dense.width(unit) for unit in units)]
        rows = torch.cat([start + kept[unit] for start, unit in zip(starts, units, strict=False)])
        for name in (f"{projection}.weight", f"{projection}.bias"):
            if name in tensors:
                sliced[name] = tensors[name].index_select(0, rows)
    return sliced


def publish(
    out: Path,
    config: dict[str, Any],
    family: Family,
    weight_map: dict[str, str],
    total_bytes: int,
    report: PruneReport,
    lineage: Lineage,
) -> None:
    """Write what turns finished shards into a model: report, lineage, code, index and, last of all, config.json."""
    write_atomically(out / REPORT, json_bytes(report.to_dict()))
    write_atomically(out / LINEAGE, json_bytes(lineage.to_dict()))
    if config["model_type"] == family.slim:
        for source in (Path(modeling.__file__).parent / name for name in ("per_layer.py", f"{family.slim}.py")):
            write_atomically(out / source.name, source.read_bytes())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_atomically(out / INDEX, json_bytes(index))
    write_atomically(out / CONFIG, json_bytes(config))


def config_sha256(config: dict[str, Any]) -> str:
    """The sha256 that ``publish`` gives config.json."""
    return hashlib.sha256(json_bytes(config)).hexdigest()
