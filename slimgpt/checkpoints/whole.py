"""Whether a checkpoint holds the tensors that its config.json describes, and no others in its layers: from headers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from slimgpt.checkpoints.building import building_model_of
from slimgpt.checkpoints.families import family_of
from slimgpt.checkpoints.shards import Shards


def check_tensors(shards: Shards, model_config: Any) -> None:
    """Refuse weights that are not those of the config.

    transformers makes up what is missing, at random, and passes over layers and biases that the config does not know.
    What lies beside the decoder layers and the head (a value head, a vision tower) is no part of this model.

    Args:
        shards: the weights, under their family's names, not quantised.
        model_config: of the same folder.

    Raises:
        ValueError: naming the tensor, both shapes and the remedy; or what of the config transformers does not take.
    """
    with building_model_of(shards.folder), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    own, stored = model.state_dict(), set(shards.names())
    for name in sorted(own.keys() - set(model.all_tied_weights_keys)):
        if name not in stored:
            raise ValueError(f"{shards.folder} has no tensor {name}, {_REMEDY}")
        shape, _ = shards.shape(name)
        if shape != list(own[name].shape):
            raise ValueError(f"{shards.folder}: {name} is {shape} and not {list(own[name].shape)}, {_REMEDY}")
    check_known(shards.names(f"{family_of(model_config).layers}."), own, shards.folder)


def check_known(names: Iterable[str], own: Iterable[str], folder: Path) -> None:
    """Refuse tensors of decoder layers that the config does not describe.

    Args:
        names: of such tensors.
        own: of all tensors of the model.
        folder: of the checkpoint.

    Raises:
        ValueError: naming the first one and the remedy.
    """
    if unknown := sorted(set(names) - set(own)):
        raise ValueError(
            f"{folder} holds {unknown[0]} ({len(unknown)} such), which its config.json does not describe: "
            "it would be left out; correct config.json (num_hidden_layers, attention_bias, mlp_bias)"
        )


_REMEDY = "which its config.json describes; download or make the model again, or correct config.json"
