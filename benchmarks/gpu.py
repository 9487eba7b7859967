"""Prune models of real sizes with random weights, and print one table: seconds by phase, floor, memory, and the plans.

    python benchmarks/gpu.py                                     # all cases on one GPU, under 5 minutes
    python benchmarks/gpu.py --quick                             # four cases, 4 layers of each model, about 90 seconds
    python benchmarks/gpu.py --cases 7b,7b-host --ratio 0.5
    python benchmarks/gpu.py --tiny --device cpu                 # the same on a CPU with a tiny model, seconds

The weights are random, so the errors mean nothing; the work is that of the real model. 256 x 2048 tokens, bfloat16.
Weights and results are in memory-backed storage (/dev/shm) where there is room, else where TMPDIR says.

The floor is what forward pass (the recomputation of activations that are not kept included) and Gram products take at
the rate of one large bfloat16 product on this device:

    floor = (operations of the forward passes + operations of the Gram products) / rate

as slimgpt/engine/cost.py counts them. "Of all layers" is what all of the model's layers would take, where fewer were
pruned: each of the others as long as the median of the later half of those. The checksum of the dense model, which
comes first, is in the seconds.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from random_llama import SHAPES, random_calibration, write_random_llama

from slimgpt.config import PruneConfig, paper_preset
from slimgpt.engine.job import Job
from slimgpt.engine.pruner import prune
from slimgpt.engine.rates import measure_rates

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A model, and how it is pruned.

    Attributes:
        shape: of SHAPES.
        layers: how many of them are made and pruned; 0: all.
        prices: the default preset, errors in nats; else the paper's.
        fields: of PruneConfig.
    """

    shape: str
    layers: int = 0
    prices: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


NOTHING_KEPT = {"keep_gib": 0.0}
HOST = {"keep_gib": 0.0, "activations": "host"}
CASES = {
    "7b": Case("llama-2-7b"),
    "7b-12gib": Case("llama-2-7b", fields=NOTHING_KEPT),
    "7b-host": Case("llama-2-7b", fields=HOST),
    "7b-default": Case("llama-2-7b", prices=True),
    "13b": Case("llama-2-13b"),
    "70b-host": Case("llama-3-70b", layers=2, fields=HOST),
}
QUICK = ("7b", "7b-host", "7b-default", "70b-host")
QUICK_LAYERS = 4
COLUMNS = ["case", "layers", "seconds", "of all layers", "planned", "floor", "x floor"]
COLUMNS += ["forward", "Gram", "select", "read", "write", "peak GiB", "planned GiB", "kept"]


def measure(case: Case, dense: Path, scratch: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Prune once; all figures."""
    shutil.rmtree(scratch / "cache", ignore_errors=True)  # or a second run would find its prices
    fields = {"ratio": asked.ratio} if case.prices else paper_preset(asked.ratio)
    fields |= {"num_samples": asked.num_samples, "seq_len": asked.seq_len, "device": asked.device, **case.fields}
    config = PruneConfig(**{**fields, "ffn_multiple": 1} if asked.tiny else fields)
    shape = replace(SHAPES[case.shape], num_hidden_layers=case.layers)
    job = Job(dense, config)
    rates, cost = measure_rates(job.device, job.dtype), job.cost(job.place())
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        start = time.perf_counter()
        calibration = random_calibration(shape, asked.num_samples, asked.seq_len)
        report = prune(dense, Path(out) / "out", config, calibration=calibration)
        seconds = time.perf_counter() - start
    each = median(layer.seconds for layer in report.layers[case.layers // 2 :])
    return {
        "device": report.device,
        "layers": case.layers,
        "seconds": seconds,
        "of all layers": seconds + (SHAPES[case.shape].num_hidden_layers - case.layers) * each,
        "planned": sum(rates.seconds(cost).values()),
        "planned_by_phase": rates.seconds(cost),
        "floor": (cost.forward + cost.gram) / rates.forward,
        "x floor": seconds * rates.forward / (cost.forward + cost.gram),
        **{name: report.seconds_by_phase.get(name.lower(), 0.0) for name in COLUMNS[7:12]},
        "pruning_alone": report.seconds,
        "peak GiB": report.peak_memory_bytes / GIB,
        "planned GiB": cost.memory / GIB,
        "kept": report.layers_kept,
        "activations": report.activations,
        "tops": {name: getattr(rates, name) / 1e12 for name in ("forward", "gram", "solve")},
    }


def main() -> None:
    """Measure the cases, print each as JSON, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help=f"some of {', '.join(CASES)}; all, or with --quick four of them")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_LAYERS} layers of each model")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in place of each")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--num-samples", type=int, default=0, help="256, or 4 with --tiny")
    parser.add_argument("--seq-len", type=int, default=0, help="2048, or 64 with --tiny")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", default="", help="where models are written")
    asked = parser.parse_args()
    asked.num_samples = asked.num_samples or (4 if asked.tiny else 256)
    asked.seq_len = asked.seq_len or (64 if asked.tiny else 2048)
    lines, made, began = [], None, time.perf_counter()
    with tempfile.TemporaryDirectory(dir=asked.folder or _storage()) as folder:
        scratch = Path(folder)
        os.environ["SLIMGPT_CACHE"] = str(scratch / "cache")
        _warm_up(scratch, asked)
        for name in asked.cases.split(",") if asked.cases else QUICK if asked.quick else CASES:
            case = replace(CASES[name], shape="tiny") if asked.tiny else CASES[name]
            most = QUICK_LAYERS if asked.quick else SHAPES[case.shape].num_hidden_layers
            case = replace(case, layers=min(case.layers or most, most))
            if made != (made := (case.shape, case.layers)):
                shutil.rmtree(scratch / "dense", ignore_errors=True)
                shape = replace(SHAPES[case.shape], num_hidden_layers=case.layers)
                write_random_llama(scratch / "dense", shape, torch.bfloat16, asked.device)
            lines.append({"case": name, **measure(case, scratch / "dense", scratch, asked)})
            print(json.dumps(lines[-1], default=str), flush=True)
            if asked.device != "cpu":
                torch.cuda.empty_cache()
    print("\n| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for line in lines:
        print("| " + " | ".join(f"{x:.1f}" if isinstance(x := line[c], float) else str(x) for c in COLUMNS) + " |")
    print(f"\n{lines[0]['device']}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s in all")


def _storage() -> str | None:
    """Memory-backed storage where it holds two models of 26 GB."""
    shm = Path("/dev/shm")  # noqa: S108
    return str(shm) if shm.is_dir() and shutil.disk_usage(shm).free > 60e9 else None


def _warm_up(scratch: Path, asked: argparse.Namespace) -> None:
    """Libraries load with their first use."""
    write_random_llama(scratch / "warm", SHAPES["tiny"], torch.bfloat16, asked.device)
    config = PruneConfig(ratio=0.25, num_samples=2, seq_len=64, device=asked.device, ffn_multiple=1)
    prune(scratch / "warm", scratch / "warmed", config, calibration=random_calibration(SHAPES["tiny"], 2, 64))


if __name__ == "__main__":
    main()
