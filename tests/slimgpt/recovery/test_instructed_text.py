"""Instructions are drawn as if all of them were held, while few are."""

import hashlib
import json
import random
import tracemalloc
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from slimgpt.data import documents
from slimgpt.data.instructions import read_instructions
from slimgpt.recovery import rows
from slimgpt.recovery.text import draw


@pytest.mark.parametrize(("tokens", "seq_len"), [("all", 256), ("1k", 256), ("all", 110)])
def test_instructions_are_those_of_a_shuffle_of_all_of_them(pruned, as_in_the_paper, instructions, tokens, seq_len):
    """However they are kept: made here of all texts at once, one that seq_len leaves no answer of left out."""
    config = replace(as_in_the_paper, tokens=tokens, seq_len=seq_len).filled()
    tokenizer, wanted = AutoTokenizer.from_pretrained(pruned), []
    for pair in read_instructions(str(instructions)).pairs():
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in pair]
        row = (ids[0] + ids[1] + [tokenizer.eos_token_id])[:seq_len]
        wanted += [(row, [-100] * len(ids[0]) + row[len(ids[0]) :])] if len(row) > len(ids[0]) else []
    random.Random(config.seed).shuffle(wanted)
    text = draw(pruned, config)
    drawn = [(row["input_ids"].tolist(), row["labels"].tolist()) for row in (*text.held_out, *text.train)]
    assert drawn == wanted[: len(drawn)]
    assert len(drawn) == {("all", 256): 60, ("all", 110): 36}.get((tokens, seq_len), len(drawn))
    numbers = torch.tensor([i for row, _ in drawn for i in row])
    assert text.facts["ids_sha256"] == hashlib.sha256(numbers.numpy().tobytes()).hexdigest()


def test_memory_does_not_grow_with_a_file_of_instructions(pruned, as_in_the_paper, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "IN_MEMORY", 2**16)
    monkeypatch.setattr(rows, "IN_MEMORY", 2**16)
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for i in range(12_000):
            file.write(json.dumps({"instruction": f"Say {i}.", "output": f"{i} " + "word " * 200}) + "\n")
    config = replace(as_in_the_paper, text=str(path), tokens="4096").filled()
    draw(pruned, replace(config, text=as_in_the_paper.text))  # what is imported and kept on the way
    tracemalloc.start()
    text = draw(pruned, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text.train) < 100
    assert peak < path.stat().st_size / 2
