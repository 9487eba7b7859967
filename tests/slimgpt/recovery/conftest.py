"""A tiny pruned model, a training of twenty steps, and what an uninterrupted run makes of them."""

import json

import pytest

from slimgpt.config import RecoverConfig
from slimgpt.engine.pruner import prune
from slimgpt.recovery.recoverer import recover


@pytest.fixture(scope="session")
def pruned(tmp_path_factory, dense, tiny_config):
    """The tiny model at half its size; its widths differ from layer to layer."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune(dense, out, tiny_config(ratio=0.5))
    return out


@pytest.fixture(scope="session")
def config(text_file):
    """20 steps of 4 x 32 tokens."""
    return RecoverConfig(
        tokens="2.56k",
        text=str(text_file),
        batch_size=4,
        seq_len=32,
        learning_rate=0.004,
        held_out=4,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def recovered(tmp_path_factory, pruned, dense, config):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("recovered") / "out"
    recover(pruned, out, config, teacher=dense)
    return out


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    """Sixty sums, some with an input of their own, and one without an answer."""
    path = tmp_path_factory.mktemp("instructions") / "sums.jsonl"
    rows = [{"instruction": f"What is {i} + 1?", "input": "", "output": f"It is {i + 1}."} for i in range(40)]
    rows += [{"instruction": "Add one.", "input": str(i), "output": f"{i + 1}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"instruction": "Silence?", "output": ""}]))
    return path


@pytest.fixture(scope="session")
def as_in_the_paper(instructions):
    return RecoverConfig(
        method="lora",
        tokens="all",
        text=str(instructions),
        batch_size=8,
        held_out=4,
        learning_rate=0.01,
        dtype="float32",
    )
