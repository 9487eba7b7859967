"""A model as GGUF files: perplexity, size and greedy tokens in llama.cpp, beside transformers.

    python -m benchmarks.gguf_files MODEL                   # f16, q8_0 and q4_k_m; needs SLIMGPT_DATA

Perplexity: 4 blocks of 512 tokens of WikiText-2's test split, the first token of a block not scored; transformers in
float32, llama.cpp with keys and values in float32. Tokens: ten prompts, the 32 most likely after each.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimgpt.modeling  # noqa: F401  (registers the pruned forms)
from deploy.llamacpp.blocks import TYPES
from deploy.llamacpp.export import export, plan_export
from slimgpt.checkpoints.source import resolve_model
from slimgpt.data.text import perplexity_text
from slimgpt.recovery.answers import PROMPTS as QUESTIONS
from tests.deploy.llamacpp.runtime import LlamaCpp

BLOCKS, BLOCK_TOKENS, NEW_TOKENS = 4, 512, 32
PROMPTS = [*QUESTIONS, "The Roman Empire", "def quicksort(items):", "Once upon a time", "In 1969,", "Water boils at"]


def perplexity(logits_BTV: Tensor, ids_BT: Tensor) -> float:
    """Of blocks whose first token is not scored."""
    losses = functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())
    return float(losses.exp())


@torch.no_grad()
def main() -> None:
    """Print a row for transformers and one for each type of file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    folder = resolve_model(parser.parse_args().model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "".join(perplexity_text("wikitext2").documents)[: BLOCKS * BLOCK_TOKENS * 8]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: BLOCKS * BLOCK_TOKENS]
    ids_BT = torch.tensor(ids).view(BLOCKS, BLOCK_TOKENS)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)[
            0, len(ids) :
        ]
        for ids in prompts
    ]
    print("| | perplexity | MB | prompts with the same 32 tokens | export, s |\n|---|---:|---:|---:|---:|")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    print(f"| transformers | {perplexity(model(ids_BT).logits, ids_BT):.3f} | {size:.1f} | | |", flush=True)
    with tempfile.TemporaryDirectory() as place:
        for kind in TYPES:
            start = time.perf_counter()
            file = export(plan_export(folder, kind), Path(place) / "model.gguf")
            seconds = time.perf_counter() - start
            runtime = LlamaCpp(file, context=BLOCK_TOKENS)
            assert all(runtime.tokens(prompt) == ids for prompt, ids in zip(PROMPTS, prompts, strict=True))
            logits_BTV = torch.stack([torch.from_numpy(runtime.logits(block)) for block in ids_BT.tolist()])
            answers = [runtime.greedy(ids, NEW_TOKENS) for ids in prompts]
            runtime.close()
            same = sum(mine == theirs.tolist() for mine, theirs in zip(answers, expected, strict=True))
            print(
                f"| {kind} | {perplexity(logits_BTV, ids_BT):.3f} | {file.stat().st_size / 1e6:.1f} | "
                f"{same} of {len(PROMPTS)} | {seconds:.1f} |",
                flush=True,
            )
            if kind == "f16":
                ties = [near_tie(model, *triple) for triple in zip(prompts, answers, expected, strict=True)]
                notes = [f"{prompt!r}: {tie}" for prompt, tie in zip(PROMPTS, ties, strict=True) if tie]
    print("\n".join(["", "f16 answers otherwise, after what to transformers is a near-tie:", *notes]) if notes else "")


def near_tie(model: Any, ids: list[int], mine: list[int], theirs: Tensor) -> str:
    """The first token that differs, and by how much transformers prefers its own; empty where none does."""
    if mine == theirs.tolist():
        return ""
    at = next(i for i, (a, b) in enumerate(zip(mine, theirs.tolist(), strict=True)) if a != b)
    logits_V = model(torch.tensor([[*ids, *mine[:at]]])).logits[0, -1]
    return f"token {at + 1} of {NEW_TOKENS}, logits {logits_V[theirs[at]]:.4f} and {logits_V[mine[at]]:.4f}"


if __name__ == "__main__":
    main()
