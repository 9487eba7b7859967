"""Prune a randomly initialised LLaMA of a real model's shape: seconds by phase, peak memory, and the floor.

    python benchmarks/gpu.py                        # LLaMA-2-7B at 20 and 50 %, 256 x 2048 tokens, one GPU
    python benchmarks/gpu.py --shape 13b --ratios 0.5
    python benchmarks/gpu.py --shape tiny --num-samples 4 --seq-len 256             # a laptop CPU, seconds

The weights are random, so the errors mean nothing; the work is that of the real model. The floor is what the counted
operations (one forward pass, two Gram matrices per layer) take at the rate this device reaches on one large product.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from slimgpt.calibration import Calibration
from slimgpt.checkpoint import INDEX, write_shard
from slimgpt.config import PruneConfig
from slimgpt.plan import plan
from slimgpt.pruner import prune

SHAPES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "1b": (2048, 5632, 22, 32),
    "tiny": (256, 1024, 8, 4),
}
VOCAB = 32_000


def write_random_llama(folder: Path, shape: str, device: torch.device) -> None:
    """A bfloat16 checkpoint, one shard a layer, never more than one layer in memory."""
    hidden, wide, layers, heads = SHAPES[shape]
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        dtype="bfloat16",
    ).save_pretrained(folder)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16) * 0.02

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    parts = {"rest": {"model.embed_tokens.weight": random(VOCAB, hidden), "lm_head.weight": random(VOCAB, hidden)}}
    parts["rest"]["model.norm.weight"] = ones()
    weight_map = {}
    for i in range(layers + 1):
        if i < layers:
            name, prefix = f"layer-{i}", f"model.layers.{i}."
            tensors = {f"{prefix}self_attn.{p}_proj.weight": random(hidden, hidden) for p in "qkvo"}
            tensors |= {f"{prefix}mlp.{p}_proj.weight": random(wide, hidden) for p in ("gate", "up")}
            tensors |= {f"{prefix}{norm}.weight": ones() for norm in ("input_layernorm", "post_attention_layernorm")}
            tensors[f"{prefix}mlp.down_proj.weight"] = random(hidden, wide)
        else:
            name, tensors = "rest", parts["rest"]
        write_shard(folder / f"{name}.safetensors", tensors)
        weight_map |= dict.fromkeys(tensors, f"{name}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second that this device reaches on one large matrix product."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    _wait(device)
    start = time.perf_counter()
    for _ in range(3):
        a @ b
    _wait(device)
    return 3 * 2 * size**3 / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def floor_seconds(shape: str, num_samples: int, seq_len: int, device: torch.device, dtype: torch.dtype) -> float:
    """Projections, causal attention and the upper triangles of both Gram matrices, at the measured rates."""
    hidden, wide, layers, _ = SHAPES[shape]
    tokens = num_samples * seq_len
    forward = 2 * tokens * (4 * hidden**2 + 3 * hidden * wide) + 2 * tokens * seq_len * hidden
    gram = tokens * (hidden**2 + wide**2)
    return layers * (forward / rate(device, dtype) + gram / rate(device, torch.float32))


def main() -> None:
    """Measure, and print one JSON line per ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--ratios", default="0.2,0.5")
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    ids_NT = torch.randint(0, VOCAB, (asked.num_samples, asked.seq_len), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(ids_NT, {"name": "random ids", "sha256": "", "ids_sha256": "random", "origin": "random"})
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        dense = Path(scratch) / "dense"
        dense.mkdir()
        write_random_llama(dense, asked.shape, device)
        for ratio in map(float, asked.ratios.split(",")):
            config = PruneConfig(ratio=ratio, num_samples=asked.num_samples, seq_len=asked.seq_len, device=asked.device)
            out = Path(scratch) / "out"
            planned = plan(dense, config)
            report = prune(dense, out, config, calibration=calibration)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            floor = floor_seconds(asked.shape, asked.num_samples, asked.seq_len, device, dtype)
            line = {
                "device": report.device,
                "shape": asked.shape,
                "ratio": round(report.ratio, 4),
                "seconds": round(report.seconds, 1),
                "floor_seconds": round(floor, 1),
                "phases": {name: round(value, 1) for name, value in report.seconds_by_phase.items()},
                "peak_gib": round(report.peak_memory_bytes / 2**30, 2),
                "planned_peak_gib": round(planned.memory_bytes / 2**30, 2),
            }
            print(json.dumps(line), flush=True)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
