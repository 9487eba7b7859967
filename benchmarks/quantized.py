"""Dense and pruned models, as they are and quantised: perplexity, size and throughput in one table.

    python -m benchmarks.quantized smollm2 PRUNED              # w4a16 and w8a8 of both; needs SLIMGPT_DATA and vLLM
    python -m benchmarks.quantized smollm2 PRUNED --schemes w4a16,w8a8,fp8 --rounds 3

Calibration: 32 sequences of 1024 tokens of C4. Perplexity in transformers: blocks of 1024 tokens, the first 12 of
WikiText-2's test split, the first 24 of C4's validation text. Throughput: `vllm bench throughput`, 32 requests of 128 +
64 tokens at once, bfloat16, the models in turn in each round; the median of the rounds, lowest to highest behind it.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from deploy.bench.config import BenchConfig
from deploy.bench.vllm_bench import bench_throughput
from slimgpt.checkpoints.headers import CONFIG
from slimgpt.checkpoints.lineage import load_lineage
from slimgpt.checkpoints.source import resolve_model
from slimgpt.checkpoints.weight_files import weight_files
from slimgpt.config import EvalConfig, QuantizeConfig
from slimgpt.data.text import local_data
from slimgpt.evaluation.harness import evaluate
from slimgpt.quantization.quantizer import quantize

LOAD = BenchConfig(num_prompts=32, input_len=128, output_len=64)
TEXTS = {"wikitext2": 12, "c4/validation.jsonl": 24}


def perplexities(folder: Path) -> list[str]:
    """Of both texts, in bfloat16 where the CPU has units for it."""
    found = []
    for text, blocks in TEXTS.items():
        source = text if text == "wikitext2" else str(Path(local_data() or "") / text)
        config = EvalConfig(tasks=("none",), perplexity=source, seq_len=1024, max_blocks=blocks)
        found.append(f"{next(iter(evaluate(folder, config).metrics.values())):.2f}")
    return found


def main() -> None:
    """Quantise both models, measure all, print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("pruned")
    parser.add_argument("--schemes", default="w4a16,w8a8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--place", default="", help="folder for the quantised models; those in it are used as they are")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place, models, made = Path(given.place or temporary).absolute(), {}, {}
        for side in ("dense", "pruned"):
            models[side] = resolve_model(getattr(given, side))
            for scheme in given.schemes.split(","):
                config = QuantizeConfig(scheme=scheme, calibration="c4", num_samples=32, seq_len=1024)
                name = f"{side} {scheme}"
                models[name] = place / name.replace(" ", "-")
                if not (models[name] / CONFIG).is_file():
                    quantize(models[side], models[name], config)
                figures = load_lineage(models[name]).steps[-1].figures
                made[name] = f"{figures['seconds']:.0f} | {figures['peak_memory_bytes'] / 1e9:.1f}"
                print(f"{name}: {made[name]}", flush=True)
        runs: dict[str, list[float]] = {name: [] for name in models}
        for i in range(given.rounds):
            for name, folder in models.items():
                result = Path(temporary) / f"{name.replace(' ', '-')}-{i}.json"
                rate = bench_throughput(folder, LOAD, seed=i, result=result)["output_throughput"]
                runs[name].append(rate)
                print(f"{name}: {rate:.0f} tokens/s", flush=True)
        print("| | WikiText-2 | C4 | MB | new tokens/s | quantised in, s | GB |\n|---|---:|---:|---:|---:|---:|---:|")
        for name, folder in models.items():
            size = sum((folder / file).stat().st_size for file in weight_files(folder)) / 1e6
            low, high = min(runs[name]), max(runs[name])
            speed = f"{statistics.median(runs[name]):.0f} ({low:.0f} to {high:.0f})"
            cells = [*perplexities(folder), f"{size:.1f}", speed]
            print(f"| {name} | {' | '.join(cells)} | {made.get(name, ' | ')} |", flush=True)


if __name__ == "__main__":
    main()
