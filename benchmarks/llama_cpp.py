"""A model as GGUF files: perplexity, size and greedy tokens in llama.cpp, beside transformers.

    python -m benchmarks.llama_cpp MODEL                   # f16, q8_0 and q4_k_m; needs SLIMGPT_DATA

Perplexity: 4 blocks of 512 tokens of WikiText-2's test split, the first token of a block not scored; transformers in
float32, llama.cpp with keys and values in float32. Tokens: ten prompts, the 32 most likely after each.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimgpt.modeling  # noqa: F401  (registers the pruned forms)
from deploy.gguf.blocks import TYPES
from deploy.gguf.export import export, plan_export
from slimgpt.checkpoints.source import resolve_model
from slimgpt.data.text import perplexity_text
from slimgpt.recovery.answers import PROMPTS as QUESTIONS
from tests.deploy.gguf.llama_cpp import LlamaCpp

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
            same = sum(
                runtime.greedy(ids, NEW_TOKENS) == answer.tolist()
                for ids, answer in zip(prompts, expected, strict=True)
            )
            runtime.close()
            print(
                f"| {kind} | {perplexity(logits_BTV, ids_BT):.3f} | {file.stat().st_size / 1e6:.1f} | "
                f"{same} of {len(PROMPTS)} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
