"""Whether a checkpoint holds every tensor of the model that its config.json describes: from headers alone."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from slimgpt.checkpoints.building import building
from slimgpt.checkpoints.shards import Shards


def check_tensors(shards: Shards, model_config: Any) -> None:
    """Refuse weights that are not those of the config: transformers would make up what is missing, at random.

    Args:
        shards: the weights, under their family's names, not quantised.
        model_config: of the same folder.

    Raises:
        ValueError: naming the tensor, both shapes and the remedy.
    """
    with building, torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    own, stored = model.state_dict(), set(shards.names())
    for name in sorted(own.keys() - set(model.all_tied_weights_keys)):
        if name not in stored:
            raise ValueError(f"{shards.folder} has no tensor {name}, {_REMEDY}")
        shape, _ = shards.shape(name)
        if shape != list(own[name].shape):
            raise ValueError(f"{shards.folder}: {name} is {shape} and not {list(own[name].shape)}, {_REMEDY}")


_REMEDY = "which its config.json describes; download or make the model again, or correct config.json"
