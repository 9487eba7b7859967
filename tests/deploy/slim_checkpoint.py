"""A tiny random checkpoint with per-layer widths, laid out as slimgpt/checkpoints/shards.py writes one."""

import json
import shutil
from pathlib import Path

import torch

from slimgpt.modeling import per_layer, slim_llama
from slimgpt.modeling.slim_llama import SlimLlamaConfig, SlimLlamaForCausalLM
from tests import tiny_models

# heads, kv heads, FFN width: fewer kv heads, fewer queries per kv head, multi-query, an untouched layer
WIDTHS = [(6, 2, 96), (4, 4, 128), (3, 1, 64), (8, 4, 256)]


def write_slim(
    folder: Path, *, widths: list[tuple[int, int, int]] = WIDTHS, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Path:
    """Write a SlimLLaMA of these widths and head_dim 32 (vLLM's CPU attention takes no smaller one)."""
    torch.manual_seed(seed)
    config = SlimLlamaConfig(
        vocab_size=tiny_models.VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(widths),
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.1,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        per_layer_config={
            i: {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": width}
            for i, (heads, kv_heads, width) in enumerate(widths)
        },
    )
    SlimLlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    for module in (slim_llama, per_layer):
        shutil.copy(module.__file__, folder)
    written = json.loads((folder / "config.json").read_text())
    written["auto_map"] = {
        "AutoConfig": "slim_llama.SlimLlamaConfig",
        "AutoModel": "slim_llama.SlimLlamaModel",
        "AutoModelForCausalLM": "slim_llama.SlimLlamaForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    tiny_models.write_tokenizer(folder)
    return folder


def write_dense(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """The dense LLaMA that ``write_slim`` could have come from."""
    return tiny_models.write_dense(
        folder, num_hidden_layers=len(WIDTHS), hidden_size=128, head_dim=32, intermediate_size=256, dtype=dtype
    )
