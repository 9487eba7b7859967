"""The two ways vLLM serves a pruned checkpoint: offline throughput of the plugin's classes and of no plugin at all.

    slimgpt prune smollm2 out --ratio 0.25 --num-samples 8 --seq-len 512
    python benchmarks/serve_paths.py out
    python benchmarks/serve_paths.py out --num-prompts 4 --output-len 8 --rounds 1      # quick, to see it run

Plugin: the native class, no remote code. Backend: VLLM_PLUGINS empty and trust_remote_code, so vLLM's Transformers
backend runs the module inside the checkpoint. Each eager and compiled. All four engines stay up, one per process, and
only one works at a time: a warm-up each, then round after round in turn, every round with new random prompts and
answers of a fixed length. Prints one JSON line per way: tokens/s of every round, and the backend's share of the plugin.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = {  # plugin?, eager?
    "plugin, compiled": (True, False),
    "backend, compiled": (False, False),
    "plugin, eager": (True, True),
    "backend, eager": (False, True),
}


def engine(asked: argparse.Namespace) -> None:
    """One engine: for every seed on stdin, the seconds that its round took on stdout."""
    from deploy.engines.vllm_entry import answer_vllm_version

    answer_vllm_version()
    from vllm import LLM, SamplingParams

    llm = LLM(
        asked.model,
        dtype="bfloat16",
        enforce_eager=asked.eager,
        trust_remote_code=not asked.plugin,
        gpu_memory_utilization=0.2,
        max_num_seqs=asked.num_prompts,
        max_model_len=asked.input_len + asked.output_len,
        enable_prefix_caching=False,
    )
    # What serves is asked of the engine, or the four ways could be one.
    (served_by,) = llm.apply_model(lambda model: type(model).__name__)
    print(f"READY {served_by}", flush=True)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    fixed = SamplingParams(temperature=0, max_tokens=asked.output_len, ignore_eos=True)
    for line in sys.stdin:
        draw = random.Random(int(line))
        prompts = [
            {"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(asked.input_len)]}
            for _ in range(asked.num_prompts)
        ]
        started = time.perf_counter()
        done = llm.generate(prompts, fixed, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(request.outputs[0].token_ids) == asked.output_len for request in done)
        print(f"SECONDS {seconds}", flush=True)


def start(way: str, log: Path) -> subprocess.Popen[str]:
    """The engine of one way, in a process of its own."""
    plugin, eager = WAYS[way]
    command = [sys.executable, *sys.argv, "--as-engine"] + ["--plugin"] * plugin + ["--eager"] * eager
    env = os.environ | {
        "VLLM_PLUGINS": "slimgpt" if plugin else "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
    )


def said(process: subprocess.Popen[str], word: str, log: Path) -> str:
    """What follows ``word`` in the engine's next line that starts with it."""
    for line in process.stdout or ():
        if line.startswith(word + " "):
            return line.removeprefix(word + " ").strip()
    raise SystemExit(f"the engine ended; its log is {log}")


def main() -> None:
    """Measure, and print one JSON line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    for hidden in ("--as-engine", "--plugin", "--eager"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.as_engine:
        engine(asked)
        return
    logs = {way: Path(f"serve_paths-{way.replace(', ', '-')}.log") for way in WAYS}
    engines: dict[str, subprocess.Popen[str]] = {}
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    try:
        served_by = {}
        for way in WAYS:  # one after the other: compiling together they would slow each other down
            engines[way] = start(way, logs[way])
            served_by[way] = said(engines[way], "READY", logs[way])
        for seed in range(asked.rounds + 1):
            for way, process in engines.items():
                print(seed, file=process.stdin, flush=True)
                seconds = float(said(process, "SECONDS", logs[way]))
                if seed:  # the first round warms up
                    rates[way].append(asked.num_prompts * asked.output_len / seconds)
    finally:
        for process in engines.values():
            process.kill()
            process.wait()
    for way, tokens_per_s in rates.items():
        kind = way.split(", ")[1]
        shares = [mine / plugin for mine, plugin in zip(tokens_per_s, rates[f"plugin, {kind}"], strict=True)]
        line = {
            "way": way,
            "class": served_by[way],
            "tokens_per_s": [round(rate) for rate in tokens_per_s],
            "median": round(statistics.median(tokens_per_s)),
            "share_of_plugin": [round(statistics.median(shares), 3), round(min(shares), 3), round(max(shares), 3)],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
