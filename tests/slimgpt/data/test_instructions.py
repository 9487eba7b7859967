"""Instructions with answers, for recovery and as calibration text: Alpaca's fields, and what is wrong with a file."""

import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from slimgpt.data.calibration import calibrate, token_blocks
from slimgpt.data.instructions import read_instructions
from slimgpt.data.text import calibration_text, perplexity_text

ROWS = [
    {"instruction": "Add.", "input": "1 1", "output": "2"},
    {"instruction": "Say hello.", "input": "", "output": "Hello"},
    {"instruction": "Be silent.", "input": "", "output": " "},
]


ADD = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2"
)
HELLO = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nSay hello.\n\n### Response:\nHello"
)


def lines_of(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_same_rows_give_the_same_pairs_as_jsonl_and_as_parquet(tmp_path):
    lines, table = lines_of(tmp_path / "a.jsonl", ROWS), tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), table)
    first, second = read_instructions(str(lines)), read_instructions(str(table))
    assert list(first.pairs()) == list(second.pairs())
    assert first.sha256 == second.sha256
    assert (first.name, first.origin) == ("a.jsonl", "file")
    (with_input, two), (without, hello) = first.pairs()  # one has no answer
    assert (two, hello) == ("2", "Hello")
    assert "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n" in with_input
    assert "### Instruction:\nSay hello.\n\n### Response:\n" in without


@pytest.mark.skipif("SLIMGPT_DATA" not in os.environ, reason="SLIMGPT_DATA names no folder with alpaca/train.jsonl")
def test_alpaca_is_read_from_local_data():
    alpaca = read_instructions("alpaca")
    assert (alpaca.name, alpaca.origin) == ("alpaca", "local data")
    assert len(list(alpaca.pairs())) > 900


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "hello", "must be a .jsonl"),
        ("a.jsonl", '{"instruction": "Add."}', "row 1 has no field 'output' that is a text .it has: instruction"),
        ("a.jsonl", '{"instruction": ["Add."], "output": "2"}', "row 1 has no field 'instruction' that is a text"),
        (
            "a.jsonl",
            '{"instruction": "Add.", "input": ["1"], "output": "2"}',
            "row 1 has a field 'input' that is a list",
        ),
        ("a.jsonl", '{"instruction": "Add.", "output": "\\udfff"}', "row 1 holds half of a surrogate pair"),
        ("a.jsonl", '{"instruction": "Add.", "output": ""}', "holds no instruction with an answer"),
        ("a.jsonl", '["Add."]', "line 1 is a list; such a file holds one object per line"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.parquet", "no table", "cannot be read as parquet"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_instructions(str(tmp_path / name))


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="instructions 'nothere.jsonl' do not exist"):
        read_instructions("nothere.jsonl")


def test_as_calibration_text_a_document_is_the_prompt_and_the_answer_behind_it(tmp_path):
    """Word for word; one without an answer is left out, as for recovery."""
    table = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{**row, "id": 1} for row in ROWS]), table)
    without_inputs = tmp_path / "b.parquet"
    parquet.write_table(pa.table({"output": ["Hello"], "instruction": ["Say hello."]}), without_inputs)
    text = calibration_text(str(lines_of(tmp_path / "a.jsonl", ROWS)))
    assert (text.name, text.origin, list(text.documents)) == ("a.jsonl", "file", [ADD, HELLO])
    assert not text.documents.has_chats
    assert calibration_text(str(table)).sha256 == text.sha256
    assert list(calibration_text(str(without_inputs)).documents) == [HELLO]
    pairs = read_instructions(str(table)).pairs()
    assert ["".join(pair) for pair in pairs] == [ADD, HELLO]


def test_the_tokens_are_those_of_the_document_and_eos_whatever_an_answer_spells(dense, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(dense)
    spelled = {"instruction": "Say hello.", "output": f"Hello{tokenizer.eos_token}"}
    text = calibration_text(str(lines_of(tmp_path / "a.jsonl", [spelled])))
    encoded = tokenizer(HELLO + tokenizer.eos_token, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    wanted = [*encoded, tokenizer.eos_token_id]
    drawn = token_blocks(tokenizer, text, num_samples=1, seq_len=len(wanted), seed=0)
    assert drawn.ids_NT[0].tolist() == wanted
    assert encoded.count(tokenizer.eos_token_id) == 0


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("extra", "first"),
    [({"text": "plain"}, "plain"), ({"messages": [{"role": "user", "content": "Hi"}]}, '[{"role": "user"')],
)
def test_text_and_conversations_go_before_instructions(tmp_path, form, extra, first):
    """Files that were read before are read as before."""
    row, path = {**ROWS[0], **extra}, tmp_path / f"a.{form}"
    if form == "jsonl":
        lines_of(path, [row])
    else:
        parquet.write_table(pa.Table.from_pylist([row]), path)
    (document,) = calibration_text(str(path)).documents
    assert document.startswith(first)


def test_local_alpaca_as_calibration_text_alone_and_in_a_mixture(dense, tmp_path, monkeypatch):
    """By its fields: a column text, as the hub's file has it, changes nothing."""
    many = [{**row, "text": "not this"} for row in ROWS] * 40
    lines_of(tmp_path / "data/alpaca/train.jsonl", many)
    lines_of(tmp_path / "data/c4/train.jsonl", [{"text": "Some words about nothing. " * 9}] * 40)
    monkeypatch.setenv("SLIMGPT_DATA", str(tmp_path / "data"))
    text = calibration_text("alpaca")
    assert (text.name, text.origin, list(text.documents)) == ("alpaca", "local data", [ADD, HELLO] * 40)
    both = calibrate(dense, "c4,alpaca:0.25", num_samples=8, seq_len=32, seed=0)
    alone = calibrate(dense, "alpaca", num_samples=2, seq_len=32, seed=0)
    assert both.facts["name"] == "c4:0.75, alpaca:0.25"
    assert both.ids_NT[6:].tolist() == alone.ids_NT.tolist()


def test_perplexity_reads_prompts_and_answers_as_any_other_documents(tmp_path):
    text = perplexity_text(str(lines_of(tmp_path / "a.jsonl", ROWS)))
    assert list(text.documents) == [f"{ADD}\n\n{HELLO}"]
