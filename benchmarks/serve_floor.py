"""What vLLM takes besides the decoder layers: why pruning them saves less time than counting their operations says.

    python benchmarks/serve_floor.py                # SmolLM2 with 30, 15 and 2 layers; 10 minutes on 2 cores

`vllm bench throughput` of the same model with fewer layers, in turn, round after round; a line through seconds against
layers. Its slope is what layers take, and what is left at none is the floor: output head, sampling, scheduling, the
hand-over between processes. The head is also timed alone, as one step computes it, on as many threads as vLLM takes
(one core less than there are, on CPU). Prints one JSON line. LLaMA-like models.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.bench.config import BenchConfig
from deploy.bench.vllm_bench import bench_throughput
from slimgpt.checkpoints.source import resolve_model


def write_shallow(dense: Path, folder: Path, layers: int) -> None:
    """The model without its later layers."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)


def head_seconds(dense: Path, batch: int) -> float:
    """Seconds of a step's logits."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    head_VD = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16).get_output_embeddings().weight.data
    hidden_BD = torch.randn(batch, head_VD.shape[1], dtype=torch.bfloat16)
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(hidden_BD, head_VD.T)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as for slimgpt prune")
    parser.add_argument("--layers", type=int, nargs="+", default=[30, 15, 2], help="the first: all of them")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    config, dense = BenchConfig(), resolve_model(asked.model)
    seconds: dict[int, list[float]] = {layers: [] for layers in asked.layers}
    with tempfile.TemporaryDirectory() as scratch:
        for layers in asked.layers:
            write_shallow(dense, Path(scratch) / str(layers), layers)
        for seed in range(asked.rounds):
            for layers in asked.layers:
                result = Path(scratch) / f"{layers}.json"
                run = bench_throughput(Path(scratch) / str(layers), config, seed=seed, result=result)
                seconds[layers].append(run["duration"])
                print(f"{layers} layers: {run['duration']:.2f} s", flush=True)
    middle = [statistics.median(runs) for runs in seconds.values()]
    per_layer, floor = statistics.linear_regression(list(seconds), middle)
    whole = per_layer * asked.layers[0] + floor
    head = config.output_len * head_seconds(dense, config.num_prompts)
    shares = {"layers": per_layer * asked.layers[0], "head": head, "rest": floor - head}
    print(
        json.dumps(
            {
                "seconds": seconds,
                "per_layer": round(per_layer, 4),
                "floor": round(floor, 3),
                "shares": {name: round(share / whole, 3) for name, share in shares.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
