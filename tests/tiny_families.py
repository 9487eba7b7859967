"""A tiny random checkpoint of every supported family, with what makes that family special switched on."""

import json
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from slimgpt.config import PruneConfig
from slimgpt.engine.pruner import prune
from tests.tiny_models import VOCAB_SIZE, write_tokenizer

NUM_LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 64, 8, 4, 32, 128  # vLLM on CPU wants head_dim >= 32
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_OWN_HEAD_DIM = {"head_dim": HEAD_DIM}
_NO_HEAD_DIM = {"hidden_size": HEADS * HEAD_DIM}  # families whose config takes it from hidden_size

# name of the case: (model type, what differs from the shared geometry)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_OWN_HEAD_DIM, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {**_OWN_HEAD_DIM, "rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
    "vicuna": ("llama", {**_NO_HEAD_DIM, "num_key_value_heads": HEADS}),
    "mistral": ("mistral", {**_OWN_HEAD_DIM, "sliding_window": 24}),
    "qwen2": ("qwen2", {**_NO_HEAD_DIM, "tie_word_embeddings": True}),
    "qwen2_sliding": (
        "qwen2",
        {**_NO_HEAD_DIM, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", _OWN_HEAD_DIM),
    "gemma2": (
        "gemma2",
        {**_OWN_HEAD_DIM, "sliding_window": 24, "query_pre_attn_scalar": 48, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "gemma3_text",
        {**_OWN_HEAD_DIM, "sliding_window": 24, "query_pre_attn_scalar": 48, "sliding_window_pattern": 2},
    ),
    "phi3": ("phi3", {**_NO_HEAD_DIM, "partial_rotary_factor": 0.5}),
    "smollm3": ("smollm3", {**_NO_HEAD_DIM, "no_rope_layers": [1, 0, 1, 0]}),
    "olmo2": ("olmo2", {**_NO_HEAD_DIM, "intermediate_size": 512}),  # its FFN alone carries the ratio
    "granite": (
        "granite",
        {**_NO_HEAD_DIM, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4,
         "attention_multiplier": 0.1},
    ),
}  # fmt: skip


# Heads go by the ratio in every family that prunes them; FFN widths are multiples of 4 alone.
PRUNE = PruneConfig(
    ratio=0.3,
    schedule="log",
    head_budget="ratio",
    ffn_multiple=4,
    calibration="python",
    num_samples=8,
    seq_len=48,
    block_tokens=128,
)


def pruned_once(place: Path, case: str) -> tuple[Path, Path]:
    """Folders of the case's dense checkpoint and of the one that PRUNE makes of it, made by whoever asks first."""
    dense, out = place / case / "dense", place / case / "out"
    place.mkdir(exist_ok=True)
    with FileLock(place / f"{case}.lock"):
        if not (out / "config.json").is_file():  # written last
            prune(write_family(dense, case), out, PRUNE)
    return dense, out


def write_family(folder: Path, case: str, **overrides: Any) -> Path:
    """Write the dense checkpoint of one case, in float32, and return the folder."""
    model_type, special = CASES[case]
    fields = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = CONFIG_MAPPING[model_type](**{**fields, **special, **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # larger than the default initialisation, so that every part matters and greedy tokens differ
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if "embed" in name else parameter.shape[1] ** -0.5))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_baichuan(folder: Path) -> tuple[Path, Path]:
    """The same weights as Baichuan-7B stores them, and as LLaMA stores them."""
    llama = write_family(folder / "llama", "vicuna")
    baichuan = folder / "baichuan"
    baichuan.mkdir()
    tensors = load_file(llama / "model.safetensors")
    for i in range(NUM_LAYERS):
        prefix = f"model.layers.{i}.self_attn."
        tensors[f"{prefix}W_pack.weight"] = torch.cat([tensors.pop(f"{prefix}{p}_proj.weight") for p in "qkv"])
        tensors[f"{prefix}rotary_emb.inv_freq"] = torch.ones(HEAD_DIM // 2)  # old checkpoints carry it
    save_file(tensors, baichuan / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    dropped = ("architectures", "head_dim", "attention_bias", "mlp_bias", "num_key_value_heads", "rope_parameters")
    config = {key: value for key, value in config.items() if key not in dropped}
    own = {"model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"], "auto_map": {
        "AutoConfig": "configuration_baichuan.BaiChuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaiChuanForCausalLM",
    }}  # fmt: skip
    (baichuan / "config.json").write_text(json.dumps({**config, **own}))
    (baichuan / "modeling_baichuan.py").write_text("raise RuntimeError('remote code must not run')\n")
    write_tokenizer(baichuan)
    return baichuan, llama


def write_multimodal_gemma3(folder: Path) -> tuple[Path, Path]:
    """The same text model inside a multimodal Gemma 3, and alone."""
    text = write_family(folder / "text", "gemma3", tie_word_embeddings=True)
    whole = folder / "whole"
    whole.mkdir()
    tensors = {
        name.replace("model.", "language_model.model.", 1): tensor
        for name, tensor in load_file(text / "model.safetensors").items()
    }
    tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.ones(4, 3, 2, 2)
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": json.loads((text / "config.json").read_text()),
        "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 1, "hidden_size": 32},
        "eos_token_id": [0, 7],
    }
    (whole / "config.json").write_text(json.dumps(config))
    write_tokenizer(whole)
    return whole, text
