"""Peak memory of pruning a random TinyLlama-1.1B (4.4 GB in float32) on CPU, beside what the dry run says of it.

    python benchmarks/memory.py                         # 22 layers, 16 x 512 tokens
    python benchmarks/memory.py --layers 44             # twice the depth: hardly more memory
    python benchmarks/memory.py --model smollm2 --num-samples 32 --seq-len 1024

Every figure is of a child process that imports the package, notes its resident memory, sets the kernel's high-water
mark back to it (/proc/self/clear_refs) and prunes. The mark then includes every page of a mapped file that is resident,
code of libraries too; so a thread also samples the anonymous part alone, every 5 ms. The goal is held against the mark,
the stricter of the two. Linux only. The model is written to the disk that TMPDIR names.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from random_llama import SHAPES, Shape, random_calibration, write_random_llama

from slimgpt.checkpoints.source import resolve_model
from slimgpt.config import PruneConfig
from slimgpt.engine.job import Job
from slimgpt.engine.pruner import prune
from slimgpt.engine.rates import measure_rates


def measured(shape: Shape | None, model: str, config: PruneConfig) -> dict[str, Any]:
    """Prune in a child process a random model of this shape, or ``model``; sizes in GiB."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "dense", Path(scratch) / "out"
        if shape:
            write_random_llama(folder, shape, torch.float32)
        else:
            folder = resolve_model(model)
        job = Job(folder, config)
        cost, rates = job.cost(), measure_rates(job.device, job.dtype)
        asked = {"shape": asdict(shape) if shape else None, "config": config.to_dict()}
        command = [sys.executable, __file__, "--child", folder, out, json.dumps(asked)]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]
        disk = sum(path.stat().st_size for path in out.iterdir())
    return {
        **json.loads(line),
        "planned_peak": _gib(cost.memory),
        "disk": _gib(disk),
        "planned_disk": _gib(cost.disk),
        "planned_seconds": {name: round(value, 1) for name, value in rates.seconds(cost).items()},
    }


def child(folder: Path, out: Path, shape: Shape | None, config: PruneConfig) -> dict[str, Any]:
    """Prune, and say what this process took."""
    bare, bare_anonymous = _status("VmRSS"), _status("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")
    anonymous, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            anonymous[0] = max(anonymous[0], _status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    drawn = random_calibration(shape, config.num_samples, config.seq_len) if shape else None
    report = prune(folder, out, config, calibration=drawn)
    done.set()
    sampler.join()
    peak = _status("VmHWM")
    return {
        "bare_import": _gib(bare),
        "peak": _gib(peak),
        "above_bare_import": _gib(peak - bare),
        "anonymous_above_bare_import": _gib(anonymous[0] - bare_anonymous),
        "seconds": round(report.seconds, 1),
        "phases": {name: round(value, 1) for name, value in report.seconds_by_phase.items()},
    }


def _status(key: str) -> int:
    """Bytes under this key of /proc/self/status."""
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def _gib(size: float) -> float:
    return round(size / 2**30, 3)


def main() -> None:
    """Print one JSON line."""
    if sys.argv[1:2] == ["--child"]:
        folder, out, asked_json = sys.argv[2:]
        given = json.loads(asked_json)
        shape = Shape(**given["shape"]) if given["shape"] else None
        print(json.dumps(child(Path(folder), Path(out), shape, PruneConfig(**given["config"]))), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyllama-1.1b", help="of random_llama.py, or as for slimgpt prune")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    asked = parser.parse_args()
    config = PruneConfig(ratio=asked.ratio, num_samples=asked.num_samples, seq_len=asked.seq_len, device="cpu")
    shape = replace(SHAPES[asked.model], num_hidden_layers=asked.layers) if asked.model in SHAPES else None
    print(json.dumps({"model": asked.model, **measured(shape, asked.model, config)}))


if __name__ == "__main__":
    main()
