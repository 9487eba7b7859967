"""A GGUF file as a model: de-quantised once into a folder of the cache, its tokenizer as llama.cpp uses it."""

import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slimgpt.checkpoints.building import building
from slimgpt.checkpoints.headers import CONFIG
from slimgpt.files import file_sha256, partial_folder, share

ENDING = ".gguf"
ROPE_FACTORS = "rope_freqs.weight"
SOURCE_KEY = "dequantized_from"  # in config.json: name of the file, and what its blocks were
# Names of llama.cpp for ways to cut text: where single digits come first, and where whole words go past the merges.
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r")
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "tekken")


def convert_gguf(file: Path, cache: Path) -> Path:
    """The folder of safetensors in bfloat16 that ``file`` becomes; the same file is converted once.

    Args:
        file: one whole GGUF file, of any type of blocks.
        cache: folder in which the new one lies, under the file's name and digest.

    Raises:
        ValueError: for a part of a split file, a damaged one, an architecture or a rotary embedding that transformers
            cannot read; where the package gguf is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file} needs the package gguf: pip install 'slimgpt[gguf]'")
    metadata, tensors = _header(file)
    if metadata.get("split.count", 0) > 1:
        raise ValueError(f"{file} is one part of {metadata['split.count']}; join them with llama-gguf-split --merge")
    folder = cache / f"{file.stem}-{file_sha256(file)[:12]}"
    if (folder / CONFIG).is_file():
        return folder
    rope = rope_scaling(file, metadata, tensors)
    model, tokenizer = read_gguf(file)
    model.config.rope_parameters = {**model.config.rope_parameters, **rope}
    setattr(model.config, SOURCE_KEY, f"{file.name} ({block_kinds(metadata)})")
    restore_habits(tokenizer, metadata)
    write_converted(model, tokenizer, folder)
    return folder


def read_gguf(file: Path) -> tuple[Any, Any]:
    """Model, in bfloat16, and tokenizer, as transformers reads them.

    Raises:
        ValueError: where it cannot.
    """
    try:
        with building:
            model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{file} cannot be read by transformers: {str(error).splitlines()[0]}; if it should be one that it reads, "
            "copy or download it again, else name the model's folder of safetensors"
        ) from None
    del model.config.quantization_config  # the weights are de-quantised: say so, or nothing loads them
    model.hf_quantizer = None
    return model.to(torch.bfloat16), tokenizer


def rope_scaling(file: Path, metadata: dict[str, Any], tensors: tuple[str, ...]) -> dict[str, Any]:
    """How the rotary embedding is stretched, which transformers leaves in the file; empty where it is not.

    Args:
        file: for its factors and messages.
        metadata: of the file.
        tensors: their names in the file.

    Returns:
        Entries of the config's ``rope_parameters``.

    Raises:
        ValueError: for a kind that transformers would not compute so.
    """
    rope = f"{metadata['general.architecture']}.rope"
    kind = metadata.get(f"{rope}.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(metadata[f"{rope}.scaling.factor"])}
    if kind != "none":
        raise ValueError(f"{file} stretches its rotary embedding by {kind}, which is not read from GGUF files")
    return _llama3(file, float(metadata.get(f"{rope}.freq_base", 10000.0))) if ROPE_FACTORS in tensors else {}


def _llama3(file: Path, theta: float) -> dict[str, Any]:
    """The numbers of LLaMA 3's formula that give the factors in the file."""
    from gguf import GGUFReader

    factors = next(tensor.data for tensor in GGUFReader(file).tensors if tensor.name == ROPE_FACTORS)
    for power in range(6, 18):  # the positions it was trained on before it was stretched: 8192, as far as published
        numbers = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling = {"rope_type": "llama3", **numbers, "original_max_position_embeddings": 2**power}
        made = LlamaConfig(head_dim=2 * len(factors), rope_parameters={"rope_theta": theta, **scaling})
        if np.allclose(llama3_factors(made), factors, rtol=1e-3):
            return scaling
    raise ValueError(f"{file} scales its rotary embedding otherwise than LLaMA 3, so transformers cannot compute it")


def block_kinds(metadata: dict[str, Any]) -> str:
    """What the file says its numbers are: Q4_K_M, F16, ..."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(metadata.get("general.file_type", -1)).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:  # a newer kind, or none named
        return "GGUF"


def llama3_factors(config: PretrainedConfig) -> np.ndarray:
    """What LLaMA 3 divides each rotation's frequency by, [head_dim / 2], float32."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    steps = np.arange(len(scaled), dtype=np.float64) / len(scaled)
    factors: np.ndarray = (config.rope_parameters["rope_theta"] ** -steps / scaled.double().numpy()).astype(np.float32)
    return factors


def restore_habits(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Give a tokenizer what transformers leaves in the file: BOS, the blank in front, how digits and words are cut.

    Args:
        tokenizer: of transformers, made from the file.
        metadata: of the file.
    """
    backend, said = tokenizer.backend_tokenizer, {key.removeprefix("tokenizer.ggml."): v for key, v in metadata.items()}
    pieces, cut = said.get("model") == "llama", said.get("pre", "")
    if cut in _DIGITS_FIRST:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if cut in _WHOLE_WORDS:
        backend.model.ignore_merges = True
    if pieces:  # a blank in front of every stretch of text between special tokens, or none
        front = [normalizers.Prepend("▁")] if said.get("add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
        strip = [decoders.Strip(" ", left=1)] if front else []
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        backend.decoder = decoders.Sequence(parts)
    # What llama.cpp does where the file does not say.
    if said.get("add_bos_token", pieces or cut in _WHOLE_WORDS) and (bos := tokenizer.bos_token):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )


def write_converted(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both to ``folder``, which appears complete; where another process was quicker, its folder stays."""
    with partial_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        share(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not (folder / CONFIG).is_file():
                raise


def _header(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the file says about itself, its lists left out, and the names of its tensors."""
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        metadata, tensors = read_gguf_metadata(str(file))
    except (ValueError, IndexError, KeyError, OSError, struct.error) as error:
        raise ValueError(f"{file} is damaged, or no GGUF file: {error}; download or copy it again") from None
    return dict(metadata), tuple(tensors)
