"""Token blocks: full, drawn without overlap, the same for the same seed, and containing only the text."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from slimgpt.checkpoints.source import resolve_model
from slimgpt.data.calibration import PASSAGE_BLOCKS, calibrate, token_blocks
from slimgpt.data.documents import Documents
from slimgpt.data.text import TextSource, calibration_text
from tests.tiny_models import write_dense


@pytest.fixture(scope="module")
def tokenizer(dense):
    return AutoTokenizer.from_pretrained(dense)


def test_blocks_are_the_documents_joined_by_eos_in_seeded_order(tokenizer):
    text = calibration_text("python")
    drawn = token_blocks(tokenizer, text, num_samples=6, seq_len=50, seed=3)
    assert drawn.ids_NT.shape == (6, 50)
    decoded = tokenizer.decode(drawn.ids_NT.flatten())
    first = decoded.split(tokenizer.eos_token)[0]
    assert any(first in document for document in text.documents)
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


def test_too_few_tokens_are_refused_with_the_available_number(tokenizer, tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("only a few words here")
    with pytest.raises(ValueError, match=r"tiny.txt.* has \d+ tokens, fewer than one sequence of 64; lower seq_len"):
        token_blocks(tokenizer, calibration_text(str(path)), num_samples=100, seq_len=64, seed=0)


def source(*documents: str) -> TextSource:
    return TextSource(name="given", documents=Documents(documents), origin="file")


def test_the_seed_selects_passages_of_one_long_text_file(tokenizer, text_file):
    """A .txt file is one document: shuffling documents alone would always read its beginning."""
    text = calibration_text(str(text_file))
    assert len(text.documents) == 1
    drawn = [token_blocks(tokenizer, text, num_samples=4, seq_len=32, seed=seed).ids_NT for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    starts = set()
    for seed in range(30):
        first = token_blocks(tokenizer, text, num_samples=1, seq_len=32, seed=seed).ids_NT[0]
        starts.add(text.documents[0].index(tokenizer.decode(first)))
    assert min(starts) < len(text.documents[0]) / 3 < 2 * len(text.documents[0]) / 3 < max(starts)


def test_passages_are_drawn_in_the_order_of_a_shuffled_list(tokenizer, text_file):
    """The list of all passages is what the rule says; a large text has too many to keep them."""
    long = text_file.read_text()
    texts, length = ["a short one", long, "another", long[:5000]], PASSAGE_BLOCKS * 16
    passages = [
        (text[start : start + length], start + length >= len(text))
        for text in texts
        for start in range(0, len(text), length)
    ]
    random.Random(5).shuffle(passages)
    ids = []
    for passage, last in passages:
        ids += tokenizer(passage, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * last
    drawn = token_blocks(tokenizer, source(*texts), num_samples=40, seq_len=16, seed=5)
    assert drawn.ids_NT.flatten().tolist() == ids[:640]


def test_every_token_of_the_text_is_drawn_once_and_eos_closes_documents_not_passages(tokenizer):
    long, short = "".join(f"word{i} " for i in range(500)), "a short one"
    with pytest.raises(ValueError, match="ask for at most") as error:
        token_blocks(tokenizer, source(long, short), num_samples=10_000, seq_len=2, seed=5)
    count = int(str(error.value).partition("ask for at most ")[2].split()[0])
    drawn = token_blocks(tokenizer, source(long, short), num_samples=count, seq_len=2, seed=5).ids_NT.flatten()
    text = tokenizer.decode(drawn)
    assert text.count(tokenizer.eos_token) == 2
    left = Counter(long + short) - Counter(text.replace(tokenizer.eos_token, ""))
    assert left.total() <= len(max(tokenizer.get_vocab(), key=len))  # the one token that fills no block
    assert not Counter(text.replace(tokenizer.eos_token, "")) - Counter(long + short)


def test_text_that_spells_special_tokens_remains_text(tokenizer):
    """EOS in the ids marks the end of a document, never a spelled token in its text."""
    text = "before <|endoftext|> after. "
    drawn = token_blocks(tokenizer, source(text, text), num_samples=1, seq_len=36, seed=0).ids_NT[0]
    plain = [i for part in ("before <", "|endoftext|> after. ") for i in tokenizer(part)["input_ids"]]
    assert tokenizer.decode(drawn).replace(" ", "").startswith("before<|endoftext|>after.")
    assert (drawn == tokenizer.eos_token_id).sum() == len(drawn) // (len(plain) + 1)
    assert tokenizer(text)["input_ids"].count(tokenizer.eos_token_id) == 1  # what a plain call would have made of it


def test_angle_brackets_in_manuals_are_not_special_tokens_of_a_real_model():
    """SmolLM2 has a token <filename>, as many tokenizers have <s>: manuals and HTML are full of them."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    text = "usage: tool <filename> [--force] and <s>struck</s> "
    drawn = token_blocks(tokenizer, source(text * 20), num_samples=2, seq_len=64, seed=0).ids_NT
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert not set(drawn.flatten().tolist()) & (special - {tokenizer.eos_token_id})
    assert set(tokenizer(text)["input_ids"]) & special


def test_a_tokenizer_without_eos_joins_documents_with_nothing(dense):
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.eos_token = None
    drawn = token_blocks(tokenizer, source("abc. ", "abc. "), num_samples=1, seq_len=8, seed=0).ids_NT[0]
    assert tokenizer.decode(drawn) == "abc. abc"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_max_length", [8, 10**30])
def test_no_padding_truncation_or_bos_is_applied(dense, side, model_max_length):
    """For any settings of the tokenizer: each would silently change the statistics."""
    plain = AutoTokenizer.from_pretrained(dense)
    odd = AutoTokenizer.from_pretrained(dense, padding_side=side, truncation_side=side)
    odd.add_special_tokens({"pad_token": "<pad>", "bos_token": "<bos>"})
    odd.model_max_length = model_max_length
    odd.add_bos_token = True
    odd.backend_tokenizer.enable_padding(pad_id=odd.pad_token_id, length=64, direction=side)
    odd.backend_tokenizer.enable_truncation(5)
    text = source(*(f"document {i} " * (i + 1) for i in range(12)))
    drawn = [token_blocks(t, text, num_samples=3, seq_len=40, seed=0).ids_NT for t in (plain, odd)]
    assert torch.equal(*drawn)
    assert odd.pad_token_id not in drawn[1]


def test_documents_of_any_script_and_empty_ones_between(tokenizer):
    text = source("", "ünïcödé \u4e2d\u6587 \U0001f600 ", "", "\x00\ufeff ")
    drawn = token_blocks(tokenizer, text, num_samples=1, seq_len=20, seed=1).ids_NT
    assert drawn.shape == (1, 20)


def attempt(folder, text_file, **fields):
    return calibrate(folder, str(text_file), **{"num_samples": 2, "seq_len": 32, "seed": 0, **fields})


def refused(folder, text_file, message, **fields):
    with pytest.raises(ValueError, match=message) as error:
        attempt(folder, text_file, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"])
def test_a_missing_or_damaged_tokenizer_gives_a_one_line_error(dense, tmp_path, text_file, content):
    folder = Path(shutil.copytree(dense, tmp_path / "copy"))
    (folder / "tokenizer.json").unlink()
    if content:
        (folder / "tokenizer.json").write_text(content)
    reason = r"has no tokenizer that loads without its own code .*; copy tokenizer.json"
    if content == "{":
        reason = r"copy/tokenizer.json is damaged: Expecting .*; download or copy it again"
    elif content:
        reason = "tokenizer.json is damaged: it is a pointer of git-lfs; run git lfs pull"
    refused(folder, text_file, reason)


def test_a_tokenizer_that_needs_its_own_code_is_refused_without_a_prompt(dense, tmp_path, text_file, monkeypatch):
    """transformers would prompt on the terminal, where nobody may be present."""
    folder = Path(shutil.copytree(dense, tmp_path / "copy"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | own))
    (folder / "tokenization_own.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted"))
    refused(folder, text_file, "has no tokenizer that loads without its own code")


def test_a_tokenizer_with_a_larger_vocabulary_than_the_model_is_refused(tmp_path, text_file):
    folder = write_dense(tmp_path / "m", num_hidden_layers=1)
    data = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(data))
    refused(
        folder,
        text_file,
        r"its tokenizer gives the token \d+, its embeddings end at 299; the tokenizer belongs to another",
    )


def test_sequences_longer_than_the_models_context_are_refused(dense, tmp_path, text_file):
    assert attempt(dense, text_file, seq_len=512).ids_NT.shape == (2, 512)
    refused(dense, text_file, "seq_len is 513; .* reads at most 512 tokens at once", seq_len=513)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    stretched = write_dense(tmp_path / "m", num_hidden_layers=1, rope_parameters=rope)
    assert attempt(stretched, text_file, seq_len=1024).ids_NT.shape == (2, 1024)
    refused(stretched, text_file, "at most 1024", seq_len=1025)
    refused(dense, tmp_path / "none.txt", "seq_len is 513", seq_len=513)  # before any text is read
