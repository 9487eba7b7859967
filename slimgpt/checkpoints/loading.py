"""Load a checkpoint as a transformers model, to be looked at and not trained."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from slimgpt.checkpoints.building import building_model_of
from slimgpt.checkpoints.families import attention_kernel, family_of
from slimgpt.checkpoints.headers import raw_config
from slimgpt.checkpoints.origins import open_shards, read_config
from slimgpt.checkpoints.shards import Shards
from slimgpt.checkpoints.whole import check_known

QUANTIZED_BY = "compressed-tensors"


def load_causal_lm(folder: str | Path, dtype: torch.dtype, model_config: Any = None) -> Any:
    """The model in ``folder``, on the CPU, in ``dtype``; nothing of it is trained.

    A model that is quantised in compressed-tensors' format comes with its weights de-quantised to ``dtype`` (they are
    what the stored ones stand for), its activations rounded as stored. transformers would do so at the first forward
    pass of the entire model, which a pass through the decoder alone is not.

    Args:
        folder: of the checkpoint.
        dtype: of the weights.
        model_config: where it was read, under its family's name.

    Raises:
        ValueError: for a model type that is not known; a tensor that is missing, or that its config does not describe.
        ModuleNotFoundError: a quantised model, and compressed-tensors is not installed.
    """
    folder = Path(folder)
    model_config = model_config or read_config(folder)
    if raw_config(folder).get("model_type") != model_config.model_type:
        return _under_its_familys_names(open_shards(folder), dtype, model_config)
    quantized: dict[str, Any] = getattr(model_config, "quantization_config", None) or {}
    if quantized.get("quant_method") == QUANTIZED_BY:
        model_config.quantization_config = {**quantized, "dequantize": True}
    with building_model_of(folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=model_config,
            dtype=dtype,
            trust_remote_code=False,
            attn_implementation=attention_kernel(model_config),
            output_loading_info=True,
        )
    if absent := sorted(found["missing_keys"]):  # transformers made them up
        raise ValueError(
            f"{folder} has no tensor {absent[0]}, which its config.json describes; download or make the model again"
        )
    if not quantized:  # there scales lie beside the weights
        check_known((name for name in found["unexpected_keys"] if ".layers." in name), (), folder)
    return model.eval().requires_grad_(False)


def load_to_compute(folder: str | Path, dtype: torch.dtype, model_config: Any = None) -> Any:
    """Load as ``load_causal_lm`` does, but without the model's own settings for generating text.

    transformers refuses to save a model whose settings contradict each other, such as LLaMA-2's temperature without
    sampling, and mixes them into what ``generate`` is told. The file that holds them goes along by itself.
    """
    model = load_causal_lm(folder, dtype, model_config)
    model.generation_config = GenerationConfig()
    return model


def _under_its_familys_names(shards: Shards, dtype: torch.dtype, model_config: Any) -> Any:
    """A model that transformers would read with code of its own, or with a vision tower, as its family's class."""
    with building_model_of(shards.folder):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation=attention_kernel(model_config)
        )
    own = model.state_dict()
    check_known(shards.names(f"{family_of(model_config).layers}."), own, shards.folder)
    with torch.no_grad():
        for name in sorted(own.keys() - set(model.all_tied_weights_keys)):  # one at a time: the model is held once
            own[name].copy_(shards.load([name])[name])
    return model.eval().requires_grad_(False)
