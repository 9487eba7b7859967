"""Instructions with answers: Alpaca's fields, from local data or a file, and what is wrong with a file."""

import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from slimgpt.data.instructions import read_instructions

ROWS = [
    {"instruction": "Add.", "input": "1 1", "output": "2"},
    {"instruction": "Say hello.", "input": "", "output": "Hello"},
    {"instruction": "Be silent.", "input": "", "output": " "},
]


def test_the_same_rows_give_the_same_pairs_as_jsonl_and_as_parquet(tmp_path):
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parquet.write_table(pa.Table.from_pylist(ROWS), table)
    first, second = read_instructions(str(lines)), read_instructions(str(table))
    assert first.pairs == second.pairs
    assert first.sha256 == second.sha256
    assert (first.name, first.origin) == ("a.jsonl", "file")
    (with_input, two), (without, hello) = first.pairs  # one has no answer
    assert (two, hello) == ("2", "Hello")
    assert "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n" in with_input
    assert "### Instruction:\nSay hello.\n\n### Response:\n" in without


@pytest.mark.skipif("SLIMGPT_DATA" not in os.environ, reason="SLIMGPT_DATA names no folder with alpaca/train.jsonl")
def test_alpaca_is_read_from_local_data():
    alpaca = read_instructions("alpaca")
    assert (alpaca.name, alpaca.origin) == ("alpaca", "local data")
    assert len(alpaca.pairs) > 900


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "hello", "must be a .jsonl"),
        ("a.jsonl", '{"instruction": "Add."}', "row 1 has no field 'output' that is a text .it has: instruction"),
        ("a.jsonl", '{"instruction": ["Add."], "output": "2"}', "row 1 has no field 'instruction' that is a text"),
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
