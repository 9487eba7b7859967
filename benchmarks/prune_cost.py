"""What pruning costs beside reading the calibration tokens once: a plain forward, the Gram products alone, the whole.

    python benchmarks/prune_cost.py                                # SmolLM2, 32 x 1024 tokens, 25 %, about 8 minutes
    python benchmarks/prune_cost.py --rounds 1 --num-samples 8

All three alternate in one process, so that a machine that slows down does so for all. The forward is that of the dense
decoder layers in transformers, in blocks of the same size; the Gram products are those of both maps of every layer.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModel

from slimgpt.checkpoints.source import resolve_model
from slimgpt.config import PruneConfig
from slimgpt.engine.job import Job
from slimgpt.engine.pruner import prune
from slimgpt.method.obs import Gram


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print one JSON line per round and one with the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    config = PruneConfig(ratio=asked.ratio, num_samples=asked.num_samples, seq_len=asked.seq_len, device="cpu")
    folder = resolve_model(asked.model)
    job = Job(folder, config)
    calibration = job.calibration()
    blocks_BT = calibration.ids_NT.split(max(1, config.block_tokens // config.seq_len))
    model = AutoModel.from_pretrained(folder, dtype=job.dtype).eval()
    outputs = {
        width: [torch.randn(*ids_BT.shape, width, dtype=job.dtype) for ids_BT in blocks_BT]
        for shape in job.shapes
        for width in (shape.num_heads * shape.head_dim, shape.intermediate_size)
    }

    @torch.inference_mode()
    def forward() -> None:
        for ids_BT in blocks_BT:
            model(input_ids=ids_BT, use_cache=False)

    @torch.inference_mode()
    def grams() -> None:
        for shape in job.shapes:
            for width in (shape.num_heads * shape.head_dim, shape.intermediate_size):
                gram = Gram(width, "cpu")
                for x_BTD in outputs[width]:
                    gram.add(x_BTD)

    rounds = []
    for _ in range(asked.rounds):
        line = {"forward": seconds_of(forward), "gram": seconds_of(grams)}
        with tempfile.TemporaryDirectory() as scratch:
            report = prune(folder, Path(scratch) / "out", config, calibration=calibration)
        line |= {"whole": report.seconds, "select": report.seconds_by_phase["select"]}
        line["whole / (forward + gram)"] = line["whole"] / (line["forward"] + line["gram"])
        line["select / whole"] = line["select"] / line["whole"]
        phases = {f"prune: {name}": value for name, value in report.seconds_by_phase.items() if name != "select"}
        print(json.dumps({name: round(value, 3) for name, value in {**line, **phases}.items()}), flush=True)
        rounds.append(line)
    print(json.dumps({"median": {name: round(median(r[name] for r in rounds), 3) for name in rounds[0]}}))


if __name__ == "__main__":
    main()
