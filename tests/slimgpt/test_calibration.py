"""Token blocks: every block full, drawn without overlap, the same for the same seed."""

import pytest
import torch
from transformers import AutoTokenizer

from slimgpt.calibration import token_blocks
from slimgpt.text import calibration_text


@pytest.fixture(scope="module")
def tokenizer(dense):
    return AutoTokenizer.from_pretrained(dense)


def test_blocks_are_the_documents_joined_by_eos_in_seeded_order(tokenizer):
    text = calibration_text("python")
    drawn = token_blocks(tokenizer, text, num_samples=6, seq_len=50, seed=3)
    assert drawn.ids_NT.shape == (6, 50)
    whole = tokenizer.decode(drawn.ids_NT.flatten())
    first = whole.split(tokenizer.eos_token)[0]
    assert any(document.startswith(first) for document in text.documents)
    assert torch.equal(drawn.ids_NT, token_blocks(tokenizer, text, num_samples=6, seq_len=50, seed=3).ids_NT)
    other = token_blocks(tokenizer, text, num_samples=6, seq_len=50, seed=4)
    assert not torch.equal(drawn.ids_NT, other.ids_NT)
    assert drawn.facts["ids_sha256"] != other.facts["ids_sha256"]
    assert drawn.facts["sha256"] == other.facts["sha256"] == text.sha256


def test_short_documents_fill_blocks_without_padding(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a b c\n\nd e f\n\n" * 40)
    drawn = token_blocks(tokenizer, calibration_text(str(path)), num_samples=2, seq_len=40, seed=0)
    assert drawn.ids_NT.shape == (2, 40)


def test_fewer_tokens_than_asked_for_is_said_with_what_there_is(tokenizer, tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("only a few words here")
    with pytest.raises(ValueError, match=r"tiny.txt.* has \d+ tokens; 100 samples of 64 need 6400: ask for at most 0"):
        token_blocks(tokenizer, calibration_text(str(path)), num_samples=100, seq_len=64, seed=0)
