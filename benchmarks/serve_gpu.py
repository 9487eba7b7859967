"""Dense against pruned in vLLM on a GPU: a real model's shape, random weights, per-layer widths, offline.

    python benchmarks/serve_gpu.py                              # LLaMA-2-7B, 25 and 50 %, CUDA graphs and torch.compile
    python benchmarks/serve_gpu.py --level graphs --rounds 1    # no torch.compile: starts sooner
    python benchmarks/serve_gpu.py --tiny --level eager         # the same on a CPU with a tiny model, minutes

Throughput: 256 requests of 512 prompt and 128 answer tokens at once; latency: 128 + 128 tokens, 1 and 32 requests at a
time. Models take turns, round after round, each in a fresh engine; the weights are vLLM's dummies, so answers mean
nothing and the work is real. Widths are those of the log schedule. Efficiency as in ``slimgpt bench``: the time saved
as a share of what the saved operations or bytes would save at best (deploy/bench/efficiency.py).
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from random_llama import SHAPES, Shape
from transformers import LlamaConfig

from deploy.bench.efficiency import saving, work_of
from slimgpt.checkpoints.families import family_of, layer_shapes
from slimgpt.checkpoints.pruned_form import pruned_config
from slimgpt.config import PruneConfig
from slimgpt.method.allocation import planned_shapes

LEVELS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "graphs": {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
    "compile": {},  # vLLM's defaults
}
TINY = Shape(256, 1024, 4, 4, 4, vocab_size=1024)


@dataclass(frozen=True)
class Load:
    """Requests that come at once."""

    name: str
    requests: int
    input_len: int
    output_len: int


LOADS = (Load("throughput", 256, 512, 128), Load("latency, 1", 1, 128, 128), Load("latency, 32", 32, 128, 128))
TINY_LOADS = (Load("throughput", 8, 64, 16), Load("latency, 1", 1, 32, 16), Load("latency, 2", 2, 32, 16))


def write_model(folder: Path, shape: Shape, ratio: float, ffn_multiple: int) -> Path:
    """A folder with a config.json alone: vLLM makes up the weights."""
    config = LlamaConfig(**asdict(shape), architectures=["LlamaForCausalLM"], dtype="bfloat16")
    data = config.to_dict()
    if ratio:
        pruning = PruneConfig(ratio=ratio, schedule="log", ffn_multiple=ffn_multiple)
        data = pruned_config(config, family_of(config), planned_shapes(pruning, layer_shapes(config)))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def answer(llm: Any, load: Load, vocab_size: int, seed: int) -> float:
    """Seconds that greedy answers of exactly ``output_len`` tokens to random prompts take."""
    from vllm import SamplingParams

    draw = random.Random(seed)
    prompts = [
        {"prompt_token_ids": [draw.randrange(3, vocab_size) for _ in range(load.input_len)]}
        for _ in range(load.requests)
    ]
    wanted = SamplingParams(
        temperature=0, ignore_eos=True, max_tokens=load.output_len, min_tokens=load.output_len, detokenize=False
    )
    start = time.perf_counter()
    answers = llm.generate(prompts, wanted, use_tqdm=False)
    seconds = time.perf_counter() - start
    lengths = {len(answer.outputs[0].token_ids) for answer in answers}
    if len(answers) != load.requests or lengths != {load.output_len}:
        raise RuntimeError(f"{len(answers)} answers of lengths {lengths}, requested {load}")
    return seconds


def serve(folder: Path, loads: tuple[Load, ...], vocab_size: int, options: dict[str, Any], tell: Any) -> None:
    """Start an engine, warm it up, measure each load twice; tells seconds by load."""
    from vllm import LLM

    start = time.perf_counter()
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=1024,
        enable_prefix_caching=False,
        seed=0,
        generation_config="vllm",
        **options,
    )
    taken = {"start": [time.perf_counter() - start]}
    for load in loads:
        answer(llm, load, vocab_size, seed=1)
        taken[load.name] = [answer(llm, load, vocab_size, seed=2 + k) for k in range(2)]
    tell.put(taken)
    llm.llm_engine.engine_core.shutdown()


def in_a_process(function: Callable[..., None], *args: Any) -> dict[str, list[float]]:
    """What ``function`` tells, in a process of its own: it gives all memory back.

    Forked from this one, which has imported vLLM: that takes 17 seconds. A fork must come before CUDA is touched.
    """
    context = multiprocessing.get_context("fork")
    tell = context.Queue()
    process = context.Process(target=function, args=(*args, tell))
    process.start()
    while process.is_alive() and tell.empty():
        process.join(0.2)
    if tell.empty():
        raise RuntimeError(f"the engine ended with {process.exitcode} before it had answered")
    told: dict[str, list[float]] = tell.get()
    process.join(60)
    process.kill()
    return told


def table(seconds: dict[str, dict[str, list[float]]], folders: dict[str, Path], loads: tuple[Load, ...]) -> None:
    """One line for each load and pruned model, against the dense one."""
    print("\n| load | model | dense s | pruned s | ratio | possible | efficiency |\n|---|---|---|---|---|---|---|")
    dense, *pruned = folders
    for load in loads:
        sizes = {"input_len": load.input_len, "output_len": load.output_len, "batch": load.requests}
        before = seconds[dense][load.name]
        for name in pruned:
            after = seconds[name][load.name]
            pairs = [a / b for a, b in zip(before, after, strict=True)]
            saved = saving(work_of(folders[dense], **sizes), work_of(folders[name], **sizes), pairs)
            assert saved is not None, "a pruned model needs less"
            possible = max(saved.operations, saved.bytes)
            cells = [f"{median(before):.3f}", f"{median(after):.3f}", f"{median(pairs):.2f}", f"{100 * possible:.1f} %"]
            print(f"| {load.name} | {name} | " + " | ".join(cells) + f" | {saved.efficiency.median:.2f} |")


def main() -> None:
    """Measure in turns, print JSON lines and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few requests")
    parser.add_argument("--ratios", default="0.25,0.5")
    parser.add_argument("--ffn-multiple", type=int, default=64)
    parser.add_argument("--level", choices=LEVELS, default="compile")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm.entrypoints.llm
    import vllm.v1.engine.core  # noqa: F401

    shape, loads = (TINY, TINY_LOADS) if asked.tiny else (SHAPES[asked.shape], LOADS)
    options = {"max_num_seqs": max(load.requests for load in loads), **LEVELS[asked.level]}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for ratio in [0.0, *map(float, asked.ratios.split(","))]:
            name = f"{ratio:.0%} pruned" if ratio else "dense"
            folders[name] = write_model(Path(scratch) / str(ratio), shape, ratio, asked.ffn_multiple)
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in folders}
        for number in range(asked.rounds):
            for name, folder in folders.items():
                taken = in_a_process(serve, folder, loads, shape.vocab_size, options)
                print(json.dumps({"round": number, "model": name, "level": asked.level, "seconds": taken}), flush=True)
                for load, values in taken.items():
                    seconds[name].setdefault(load, []).extend(values)
        table(seconds, folders, loads)
    print(f"\n{asked.level}, {asked.rounds} rounds, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
