"""A randomly initialised LLaMA of a real model's shape: the weights mean nothing, the work is real."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from slimgpt.checkpoints.headers import INDEX
from slimgpt.checkpoints.shards import write_shard
from slimgpt.data.calibration import Calibration
from slimgpt.method.shapes import LayerShape


@dataclass(frozen=True)
class Shape:
    """Sizes under the names of LlamaConfig."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32_000

    @property
    def layer(self) -> LayerShape:
        """One decoder layer."""
        return LayerShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.hidden_size // self.num_attention_heads,
            intermediate_size=self.intermediate_size,
        )


SHAPES = {
    "tiny": Shape(256, 1024, 8, 4, 4),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40),
    "llama-2-70b": Shape(8192, 28672, 80, 64, 8),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128_256),
    "llama-3.1-405b": Shape(16384, 53248, 126, 128, 8, 128_256),
}


def write_random_llama(folder: Path, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """A checkpoint in ``folder``, one shard a layer, never more than one layer in memory."""
    folder.mkdir()
    LlamaConfig(**asdict(shape), dtype=dtype).save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype) * 0.02

    hidden, wide, layer = shape.hidden_size, shape.intermediate_size, shape.layer
    ones = torch.ones(hidden, dtype=dtype)
    weight_map = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        if shutil.disk_usage(folder).free < 2 * sum(t.nbytes for t in tensors.values()):
            raise OSError(f"the disk of {folder} is too small for this model")
        write_shard(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))

    for i in range(shape.num_hidden_layers):
        rows = {"q": layer.width("query"), "k": layer.width("kv"), "v": layer.width("kv")}
        tensors = {f"self_attn.{p}_proj": random(width, hidden) for p, width in rows.items()}
        tensors["self_attn.o_proj"] = random(hidden, layer.width("query"))
        tensors |= {"mlp.gate_proj": random(wide, hidden), "mlp.up_proj": random(wide, hidden)}
        tensors["mlp.down_proj"] = random(hidden, wide)
        tensors |= {"input_layernorm": ones.clone(), "post_attention_layernorm": ones.clone()}
        write(f"layer-{i}.safetensors", {f"model.layers.{i}.{name}.weight": t for name, t in tensors.items()})
    for name in ("model.embed_tokens", "lm_head"):
        write(f"{name}.safetensors", {f"{name}.weight": random(shape.vocab_size, hidden)})
    write("norm.safetensors", {"model.norm.weight": ones})
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def random_calibration(shape: Shape, num_samples: int, seq_len: int) -> Calibration:
    """Token ids drawn at random."""
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(0, shape.vocab_size, (num_samples, seq_len), generator=generator)
    facts = {"name": "random ids", "sha256": "", "ids_sha256": f"random {num_samples} x {seq_len}", "origin": "random"}
    return Calibration(ids_NT, facts)
