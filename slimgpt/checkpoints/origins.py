"""Checkpoints that hold a supported family under other names: they are read as that family, tensor by tensor.

Baichuan-7B is LLaMA with q, k and v in one W_pack; the text model inside a multimodal Gemma 3 is a Gemma 3.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

import slimgpt.modeling  # noqa: F401  makes transformers know pruned checkpoints
from slimgpt.checkpoints.families import attention_kernel
from slimgpt.checkpoints.headers import CONFIG, damaged, raw_config
from slimgpt.checkpoints.shards import Shards


@dataclass(frozen=True)
class Part:
    """A tensor inside a stored one.

    Attributes:
        name: of the stored tensor.
        block, blocks: which of how many equal blocks of rows.
        unit_rows: divide each row by its norm, as the model does at every call.
    """

    name: str
    block: int = 0
    blocks: int = 1
    unit_rows: bool = False

    def cut(self, stored: Tensor) -> Tensor:
        """The tensor."""
        tensor = stored.chunk(self.blocks)[self.block].clone() if self.blocks > 1 else stored
        return torch.nn.functional.normalize(tensor.float()).to(tensor.dtype) if self.unit_rows else tensor


class MappedShards(Shards):
    """A checkpoint read under other names."""

    def __init__(self, folder: Path, part_of: Callable[[str], dict[str, Part]]):
        super().__init__(folder)
        self.parts = {name: part for stored in self.files for name, part in part_of(stored).items()}

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that start with ``prefix``."""
        return [name for name in self.parts if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of one tensor, from the header alone."""
        part = self.parts[name]
        (rows, *rest), dtype = super().shape(part.name)
        return [rows // part.blocks, *rest], dtype

    def load(self, names: list[str], device: torch.device | str = "cpu", *, pinned: bool = False) -> dict[str, Tensor]:
        """Read these tensors, each stored one once."""
        absent = [name for name in names if name not in self.parts]
        if absent:
            raise ValueError(f"{self.folder} has no tensor {absent[0]}")
        stored = super().load(list(dict.fromkeys(self.parts[name].name for name in names)), device, pinned=pinned)
        return {name: self.parts[name].cut(stored[self.parts[name].name]) for name in names}


def read_config(model: Path) -> PretrainedConfig:
    """The config of the decoder in folder ``model``, as its family writes it.

    Raises:
        ValueError: for a model type that transformers does not know, a value that it does not take, or a Baichuan that
            is not a LLaMA inside.
    """
    raw = raw_config(model)
    try:
        config = _baichuan_config(raw) if raw.get("model_type") == "baichuan" else AutoConfig.from_pretrained(model)
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{model}: model type {raw.get('model_type')!r} cannot be read: {reason}") from None
    except Exception as error:  # its checks of values, and what it computes with one of another type, share no class
        raise damaged(model / CONFIG, " ".join(str(error).split())[:200]) from None
    if config.model_type == "gemma3":
        text = config.get_text_config()
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if raw.get(key) is not None:
                setattr(text, key, raw[key])
        text.dtype = config.dtype or text.dtype
        config = text
    # Some config.json also say how their author ran the model: with a kernel that may not be here, and what its calls
    # return.
    config._attn_implementation = attention_kernel(config)
    config.return_dict = True
    if getattr(config, "quantization_config", None) == {}:
        del config.quantization_config  # it says nothing, and transformers asks it for a method
    return config


def open_shards(model: Path) -> Shards:
    """The weights of folder ``model`` under its family's names."""
    raw = raw_config(model)
    if raw.get("model_type") == "baichuan":
        normed_head = raw["vocab_size"] == _BAICHUAN2_VOCAB
        return MappedShards(model, lambda name: _baichuan_parts(name, normed_head))
    if raw.get("model_type") == "gemma3":
        return MappedShards(model, _gemma3_text_parts)
    return Shards(model)


_BAICHUAN2_VOCAB = 125_696  # the second generation divides the output head's rows by their norms


def _baichuan_config(raw: dict[str, Any]) -> LlamaConfig:
    if "max_position_embeddings" not in raw:
        raise ValueError("this Baichuan has no rotary embeddings (13B uses ALiBi), which is not supported; 7B is")
    kept = {k: v for k, v in raw.items() if k not in ("architectures", "auto_map", "model_type", "_from_model_config")}
    return LlamaConfig(**kept)


def _baichuan_parts(name: str, normed_head: bool) -> dict[str, Part]:
    if ".W_pack." in name:
        return {name.replace("W_pack", f"{p}_proj"): Part(name, i, 3) for i, p in enumerate("qkv")}
    return {name: Part(name, unit_rows=normed_head and name == "lm_head.weight")}


def _gemma3_text_parts(name: str) -> dict[str, Part]:
    """Transformers 4 wrote ``language_model.model.``, transformers 5 writes ``model.language_model.``."""
    text = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
    text = text.removeprefix("language_model.")
    return (
        {text: Part(name)}
        if text.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))
        else {}
    )
