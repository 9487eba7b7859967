"""Load a checkpoint as a transformers model, to be looked at and not trained."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import slimgpt.modeling  # noqa: F401  makes transformers know pruned checkpoints
from slimgpt.checkpoints.building import building
from slimgpt.checkpoints.families import attention_kernel

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
        ModuleNotFoundError: a quantised model, and compressed-tensors is not installed.
    """
    model_config = model_config or AutoConfig.from_pretrained(folder, trust_remote_code=False)
    quantized: dict[str, Any] = getattr(model_config, "quantization_config", None) or {}
    given = {}
    if quantized.get("quant_method") == QUANTIZED_BY:
        model_config.quantization_config = {**quantized, "dequantize": True}
        given = {"config": model_config}
    with building:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            attn_implementation=attention_kernel(model_config),
            **given,
        )
    return model.eval().requires_grad_(False)
