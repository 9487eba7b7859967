"""Conversations as calibration text: what the model's own chat template writes, token by token."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from slimgpt.data.calibration import token_blocks
from slimgpt.data.text import calibration_text, perplexity_text

TURNS = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "<|im_end|> Light."}]
SHARED = {"user": "human", "assistant": "gpt"}


@pytest.fixture(scope="module")
def tokenizer(dense: Path):
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    return tokenizer


def written(folder: Path, form: str) -> Path:
    """One conversation in a file of that form."""
    shared = [{"from": SHARED[turn["role"]], "value": turn["content"]} for turn in TURNS]
    row = {"conversations": shared, "id": 1} if form == "sharegpt" else {"messages": TURNS}
    if form == "parquet":
        parquet.write_table(pa.table({"messages": [TURNS]}), folder / "chats.parquet")
        return folder / "chats.parquet"
    (folder / "chats.jsonl").write_text(json.dumps(row) + "\n")
    return folder / "chats.jsonl"


@pytest.mark.parametrize("form", ["messages", "sharegpt", "parquet"])
def test_the_tokens_are_those_of_the_chat_template(tokenizer, tmp_path, form):
    text = calibration_text(str(written(tmp_path, form)))
    wanted = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    drawn = token_blocks(tokenizer, text, num_samples=1, seq_len=len(wanted), seed=0)
    assert drawn.ids_NT[0].tolist() == wanted  # no EOS behind it: the template ends it
    assert drawn.facts["sha256"] == calibration_text(str(written(tmp_path, "messages"))).sha256


def test_conversations_and_text_in_one_folder(tokenizer, tmp_path):
    written(tmp_path, "messages")
    (tmp_path / "more.txt").write_text("Some words.")
    text = calibration_text(str(tmp_path))
    chat = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    words = [*tokenizer("Some words.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    drawn = token_blocks(tokenizer, text, num_samples=1, seq_len=len(chat) + len(words), seed=0).ids_NT[0].tolist()
    assert drawn in (chat + words, words + chat)


def test_what_the_template_does_not_take_and_a_model_without_one_are_one_line(tokenizer, dense, tmp_path):
    text = calibration_text(str(written(tmp_path, "messages")))
    plain = AutoTokenizer.from_pretrained(dense)
    plain.chat_template = None
    with pytest.raises(ValueError, match=r"the model has no chat template for the conversation .*Why is the sky"):
        token_blocks(plain, text, num_samples=1, seq_len=4, seed=0)
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"does not fit the model's chat template \(roles must alternate\); remove it"):
        token_blocks(plain, text, num_samples=1, seq_len=4, seed=0)


def test_perplexity_takes_no_conversations(tmp_path):
    with pytest.raises(ValueError, match="holds conversations; perplexity takes plain text: a field 'text'"):
        perplexity_text(str(written(tmp_path, "messages")))
