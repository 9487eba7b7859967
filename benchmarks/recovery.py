"""What recovery gives: perplexity before and after, tokens per second, memory.

    python benchmarks/recovery.py                                          # SmolLM2 at 25 %, 131,072 tokens
    python benchmarks/recovery.py --ratio 0.5 --rounds 2 --trainable all
    python benchmarks/recovery.py --tokens 2M --learning-rate 3e-4 --trainable all      # for a GPU

Needs SLIMGPT_DATA with c4/train.jsonl, c4/validation.jsonl and wikitext-2-raw/wiki.test.raw. Perplexity: blocks of 1024
tokens, the first 12 of WikiText-2's test split, the first 24 of C4's validation text, in float32.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimgpt.modeling  # noqa: F401  (registers the pruned forms)
from slimgpt.checkpoints.source import resolve_model
from slimgpt.config import PruneConfig, RecoverConfig
from slimgpt.data.text import local_data, perplexity_text
from slimgpt.engine.pruner import prune
from slimgpt.evaluation.perplexity import perplexity
from slimgpt.recovery.recoverer import recover


def measured(folder: Path) -> str:
    """Both perplexities, as cells of a table."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = (perplexity_text("wikitext2"), 12), (perplexity_text(str(local_data() / "c4/validation.jsonl")), 24)
    values = [perplexity(model, tokenizer, text, max_blocks=blocks).perplexity for text, blocks in texts]
    return " | ".join(f"{value:.2f}" for value in values)


def main() -> None:
    """Prune and recover in turns, and print a row after each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--schedule", default="nats")
    parser.add_argument("--tokens", default="131072", help="of each training")
    parser.add_argument("--trainable", default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=0)
    given = parser.parse_args()
    dense = source = resolve_model(given.model)
    config = RecoverConfig(
        tokens=given.tokens,
        trainable=given.trainable,
        rank=given.rank,
        learning_rate=given.learning_rate,
        batch_size=given.batch_size,
    )
    print("| step | WikiText-2 | C4 | held-out KL | seconds | tokens/s | GB |\n|---|---|---|---|---|---|---|")
    print(f"| dense | {measured(dense)} | | | | |", flush=True)
    gone = 0.0
    with tempfile.TemporaryDirectory() as place:
        for i in range(1, given.rounds + 1):
            ratio = given.ratio * i / given.rounds
            pruned, out = Path(place) / f"pruned{i}", Path(place) / f"recovered{i}"
            settings = {"schedule": given.schedule, "num_samples": 32, "seq_len": 1024}
            report = prune(source, pruned, PruneConfig(ratio=1 - (1 - ratio) / (1 - gone), **settings))
            print(f"| pruned {ratio:.0%} | {measured(pruned)} | | {report.seconds:.0f} | | |", flush=True)
            step = recover(pruned, out, config, teacher=dense).lineage.steps[-1]
            figures, tokens = step.figures, step.data["tokens"]
            print(
                f"| recovered | {measured(out)} | {figures['kl_before']:.3f} -> {figures['kl_after']:.3f} "
                f"| {figures['seconds']:.0f} | {tokens / figures['seconds']:.0f} "
                f"| {figures['peak_memory_bytes'] / 1e9:.1f} |",
                flush=True,
            )
            source, gone = out, ratio


if __name__ == "__main__":
    main()
