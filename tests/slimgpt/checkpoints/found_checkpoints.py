"""Rewrites the tiny model in the configs and file layouts that users have, and checks that one is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slimgpt.engine.plan import plan
from slimgpt.engine.pruner import prune

IDS = torch.arange(2, 98).reshape(2, 48)
SMALL = {"num_hidden_layers": 2, "head_dim": 8}  # hidden 64, 8 heads: head_dim may also be left out


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(IDS).logits


def edit(folder, change=(), drop=()):
    """Change and drop keys of config.json."""
    path = folder / "config.json"
    data = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(data | dict(change)))


def as_transformers_4(folder, *, rope_scaling=None, drop=()):
    """The config as transformers 4 wrote it: torch_dtype, rope_theta and rope_scaling at the top level."""
    data = json.loads((folder / "config.json").read_text())
    change = {
        "torch_dtype": data["dtype"],
        "rope_theta": data["rope_parameters"]["rope_theta"],
        "rope_scaling": rope_scaling,
        "transformers_version": "4.31.0.dev0",
        "_name_or_path": "/home/somebody/llama",
    }
    edit(folder, change, ("dtype", "rope_parameters", *drop))


def tensors_of(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def store(folder, tensors, parts=1):
    """Rewrite the weights as one file or as ``parts`` shards with an index."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    if parts == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        shard = {key: tensors[key] for i, key in enumerate(sorted(tensors)) if i % parts == part}
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refusal(folder, tiny_config, message):
    """Check that prune and the dry run refuse it with this one-line message before long work, and write nothing."""
    out = folder.parent / "refused"
    with pytest.raises(ValueError, match=message) as error:
        prune(folder, out, tiny_config())
    assert "\n" not in str(error.value)
    assert not out.exists()
    with pytest.raises(ValueError, match=message):
        plan(folder, tiny_config())
    return str(error.value)
