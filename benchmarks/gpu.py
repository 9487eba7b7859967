"""Prune a randomly initialised LLaMA of a real model's shape: seconds by phase, peak memory, and the floor.

    python benchmarks/gpu.py                        # LLaMA-2-7B at 20 and 50 %, 256 x 2048 tokens, one GPU
    python benchmarks/gpu.py --shape llama-2-13b --ratios 0.5 --activations host
    python benchmarks/gpu.py --shape tiny --num-samples 4 --seq-len 256             # a laptop CPU, seconds

The weights are random, so the errors mean nothing; the work is that of the real model. The floor is what the operations
of one forward pass and two Gram matrices per layer, as slimgpt/engine/cost.py counts them, take at the rates this
device reaches on one large product. On CUDA the forward pass is bfloat16, H is summed by TF32 products of bfloat16
numbers, which are exact, into float32, and units are chosen in float64. The model is written to the disk that TMPDIR
names.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from random_llama import SHAPES, random_calibration, write_random_llama

from slimgpt.config import PruneConfig
from slimgpt.engine.cost import measure_rates
from slimgpt.engine.job import Job
from slimgpt.engine.pruner import prune


def main() -> None:
    """Measure, and print one JSON line per ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--ratios", default="0.2,0.5")
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--activations", choices=["auto", "device", "host", "disk"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    calibration = random_calibration(SHAPES[asked.shape], asked.num_samples, asked.seq_len)
    with tempfile.TemporaryDirectory() as scratch:
        dense = Path(scratch) / "dense"
        write_random_llama(dense, SHAPES[asked.shape], torch.bfloat16, device)
        for ratio in map(float, asked.ratios.split(",")):
            config = PruneConfig(
                ratio=ratio,
                num_samples=asked.num_samples,
                seq_len=asked.seq_len,
                device=asked.device,
                activations=asked.activations,
            )
            job = Job(dense, config)
            rates = measure_rates(device, job.dtype)
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                report = prune(dense, Path(out), config, calibration=calibration)
            cost = job.cost(report.activations)
            line = {
                "device": report.device,
                "shape": asked.shape,
                "ratio": round(report.ratio, 4),
                "seconds": round(report.seconds, 1),
                "floor_seconds": round(cost.forward / rates.forward + cost.gram / rates.gram, 1),
                "planned_seconds": {name: round(value, 1) for name, value in rates.seconds(cost).items()},
                "phases": {name: round(value, 1) for name, value in report.seconds_by_phase.items()},
                "activations": report.activations,
                "peak_gib": round(report.peak_memory_bytes / 2**30, 2),
                "planned_peak_gib": round(cost.memory / 2**30, 2),
                "tops": {name: round(getattr(rates, name) / 1e12, 2) for name in ("forward", "gram", "solve")},
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
