"""Which operations of a decoder layer pruning makes quicker in vLLM, and which it leaves as they are.

    slimgpt prune smollm2 out --ratio 0.25 --num-samples 32 --seq-len 1024
    python benchmarks/serve_ops.py smollm2 out                            # 3 minutes on 2 cores

torch's profiler around vLLM's own engine in one process, eager (compiled, operations have no names of their own), after
a round to warm up: 32 random prompts of 128 tokens at once, 64 new tokens each. Self time by kind, in seconds,
and for each model after the first its share of the first's. Profiling itself slows small operations most, so the shares
say where the time goes, not how fast a server is; `slimgpt bench` says that. Prints one JSON line per model.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from slimgpt.checkpoints.source import resolve_model

KINDS = {  # the first whose words are in an operation's name
    "attention": ("attention", "reshape_and_cache", "cpu_attn"),
    "products": ("mm", "linear", "matmul", "onednn", "gemm"),
    "norms": ("norm",),
    "activation": ("silu", "gelu"),
    "rotary": ("rotary",),
    "copies": ("copy", "clone", "cat", "contiguous", "index", "slice", "to_copy", "empty", "fill", "view"),
}
PROMPTS, INPUT_LEN, OUTPUT_LEN = 32, 128, 64


def kind_of(name: str) -> str:
    """The kind of an operation."""
    return next((kind for kind, words in KINDS.items() if any(word in name.lower() for word in words)), "other")


def profile(model: str) -> None:
    """Print this model's seconds by kind, and the names that took most, as JSON."""
    from deploy.engines.vllm_entry import answer_vllm_version

    answer_vllm_version()
    import torch
    from vllm import LLM, SamplingParams

    length = INPUT_LEN + OUTPUT_LEN
    limits = {"max_num_seqs": PROMPTS, "max_model_len": length, "gpu_memory_utilization": 0.2}
    llm = LLM(model, dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False, **limits)
    fixed = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)

    def work(seed: int) -> None:
        draw, vocabulary = random.Random(seed), llm.llm_engine.model_config.get_vocab_size()
        ids = [[draw.randrange(vocabulary) for _ in range(INPUT_LEN)] for _ in range(PROMPTS)]
        llm.generate([{"prompt_token_ids": prompt} for prompt in ids], fixed, use_tqdm=False)

    work(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        work(1)
    taken = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    kinds: dict[str, float] = defaultdict(float)
    for name, seconds in taken.items():
        kinds[kind_of(name)] += seconds
    most = sorted(taken, key=lambda name: -taken[name])[:15]
    print("OPS " + json.dumps({"kinds": kinds, "most": {name: round(taken[name], 3) for name in most}}), flush=True)


def main() -> None:
    """Print one JSON line per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="dense first; as for slimgpt prune")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        profile(asked.models[0])
        return
    env = os.environ | {
        "VLLM_PLUGINS": "slimgpt",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    first: dict[str, float] = {}
    for model in asked.models:
        command = [sys.executable, __file__, "--here", str(resolve_model(model))]
        output = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(next(line for line in output.splitlines() if line.startswith("OPS ")).removeprefix("OPS "))
        kinds = found["kinds"]
        first = first or kinds
        line = {
            "model": model,
            "seconds": {kind: round(seconds, 2) for kind, seconds in kinds.items()},
            "of_first": {kind: round(seconds / first[kind], 2) for kind, seconds in kinds.items() if kind in first},
            "most": found["most"],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
