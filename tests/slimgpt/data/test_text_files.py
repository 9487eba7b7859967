"""Files of text: what is read of each kind, and the errors of damaged ones."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from slimgpt.data.text import calibration_text, perplexity_text

ROWS = ["One document about nothing.", "Another, with an umlaut: ü."]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ROWS, "id": [1, 2]}), tmp_path / "a.parquet")
    from_jsonl = calibration_text(str(write_jsonl(tmp_path / "a.jsonl", ROWS)))
    from_parquet = calibration_text(str(tmp_path / "a.parquet"))
    assert list(from_jsonl.documents) == list(from_parquet.documents) == ROWS
    assert from_jsonl.sha256 == from_parquet.sha256


def compressed(kind: str, data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, kind) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def test_compressed_files_give_the_same_documents(tmp_path: Path) -> None:
    """gzip and zstd, C4's own shard name, and a file of two gzip members, as `cat a.gz b.gz` writes it."""
    lines = write_jsonl(tmp_path / "a.jsonl", ROWS * 3000).read_bytes()
    half = lines.index(b"\n", len(lines) // 2) + 1
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(
        gzip.compress(lines[:half]) + gzip.compress(lines[half:])
    )
    (tmp_path / "a.jsonl.zst").write_bytes(compressed("zstd", lines))
    expected = calibration_text(str(tmp_path / "a.jsonl"))
    assert len(expected.documents) == 6000
    for name in ("a.jsonl.gz", "c4-train.00000-of-01024.json.gz", "a.jsonl.zst"):
        assert calibration_text(str(tmp_path / name)).sha256 == expected.sha256


def test_a_folder_gives_its_text_files_in_order_of_name(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    (folder / "nested").mkdir(parents=True)
    parquet.write_table(pa.table({"text": ["third"]}), folder / "c.parquet")
    write_jsonl(folder / "a.jsonl", ["first", "second"])
    write_jsonl(folder / "nested/d.jsonl", ["not looked at"])
    (folder / "folder.txt").mkdir()
    (folder / ".hidden.txt").write_text("no")
    (folder / "README.md").write_text("no")
    source = calibration_text(str(folder))
    assert (source.name, source.origin, list(source.documents)) == ("shards", "file", ["first", "second", "third"])
    (folder / "b.jsonl").write_text("broken")
    with pytest.raises(ValueError, match="b.jsonl' line 1 is not JSON"):
        calibration_text(str(folder))
    with pytest.raises(ValueError, match="is a folder without a .jsonl"):
        calibration_text(str(tmp_path))


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"plain")
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "a"}\r\n' + mark + b'{"text": "b"}\r\n')  # as cat joins two
    assert list(calibration_text(str(tmp_path / "a.txt")).documents) == ["plain"]
    assert list(calibration_text(str(tmp_path / "a.jsonl")).documents) == ["a", "b"]


def test_line_breaks_inside_a_document_are_kept(tmp_path: Path) -> None:
    odd = "a\u2028b\u0085c\x0bd\r\ne\x00f"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": odd}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(calibration_text(str(tmp_path / "a.jsonl")).documents) == [odd]


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    raw = "A line\r\n\n \nand ü\n".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    source = perplexity_text(str(tmp_path / "a.txt"))
    assert [text.encode() for text in source.documents] == [raw]
    assert source.sha256 == hashlib.sha256(raw).hexdigest()


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    text = calibration_text(str(write_jsonl(tmp_path / "a.jsonl", ["a", "", " \n", "b"])))
    assert list(text.documents) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("a.csv", b"text\na", "must be a .jsonl, .jsonl.gz, .jsonl.zst, .json.gz, .txt, .raw, .parquet file, a folder"),
        ("a.json", b'{"text": "a"}', "must be a .jsonl"),
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b'{"text": " "}\n\n', "holds no text"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"content": "b", "id": 1}\n',
            r"line 2 has no field 'text' that is a string, nor messages, .* and output \(it has: content, id\); rename",
        ),
        ("b.jsonl", b'{"text": ["a"]}\n', "line 1 has no field 'text'"),
        ("c.jsonl", b'"only a string"\n', r"line 1 is a str; such a file holds one object per line"),
        ("d.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("e.jsonl", b"\x1f\x8b\x08\x00", "line 1 is not UTF-8"),
        ("g.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2 is not UTF-8 text \(byte 10\)"),
        ("h.jsonl", '{"text": "wide"}'.encode("utf-16"), "line 1 is not UTF-8"),
        ("i.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', "line 2 holds half of a surrogate pair"),
        ("j.jsonl", b'[{"text": "a"}]', r"line 1 is a list; such a file holds one object per line"),
        ("k.jsonl", b'{"text": NULL}', "line 1 is not JSON"),
        ("u.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1 is not JSON .Exceeds the limit"),
        ("v.jsonl", b"[" * 100_000, "line 1 is not JSON .maximum recursion depth"),
        ("l.jsonl", b'{"text": null, "lang": "en"}', r"line 1 has no field 'text' that is a string"),
        (
            "m.jsonl",
            b'{"messages": [{"role": "user"}]}',
            "line 1: messages must be a list of turns with 'role' and 'cont",
        ),
        (
            "n.jsonl",
            b'{"conversations": "hello"}',
            "line 1: conversations must be a list of turns with 'from' and 'value'",
        ),
        ("o.jsonl", b'{"messages": []}', "line 1: messages must be a list of turns"),
        (
            "p.jsonl",  # Dolly's names
            b'{"instruction": "Add.", "context": "1 1", "response": "2"}',
            r"nor messages, conversations, or instruction and output \(it has: instruction, context, response\)",
        ),
        ("q.jsonl", b'{"instruction": "Add.", "output": 2}', "line 1 has no field 'output' that is a text"),
        (
            "r.jsonl",
            b'{"instruction": "Add.", "input": [1], "output": "2"}',
            "line 1 has a field 'input' that is a list",
        ),
        ("s.jsonl", b'{"instruction": "Add.", "output": ""}', "holds no text"),
        ("t.jsonl", b'{"instruction": "\\ud83d", "output": "2"}', "line 1 holds half of a surrogate pair"),
        ("a.jsonl.gz", b'{"text": "not compressed"}\n', "cannot be read: .*; copy or download it again"),
        ("b.jsonl.gz", compressed("gzip", b'{"text": "a"}\n' * 999)[:-9], "cannot be read: Truncated"),
        ("c.jsonl.gz", compressed("gzip", b'{"text": "a"}\n{"body": "b"}\n'), r"line 2 has no field 'text'"),
        ("d.jsonl.gz", compressed("gzip", b""), "holds no text"),
        ("f.txt", "für".encode("latin-1"), "is not UTF-8"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("empty.parquet", b"", "cannot be read as parquet"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for read in (calibration_text, perplexity_text):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            read(str(tmp_path / name))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"body": ["a"], "id": [1]}, r"no column 'text', nor .* instruction and output \(it has: body, id\)"),
        ({"text": [1]}, "strings"),
        ({"instruction": ["Add."], "response": ["2"]}, r"instruction and output \(it has: instruction, response\)"),
        ({"instruction": ["Add.", None], "output": ["2", "3"]}, "row 2 has no field 'instruction' that is a text"),
    ],
)
def test_parquet_without_text_is_refused(tmp_path: Path, column: dict[str, list[object]], message: str) -> None:
    parquet.write_table(pa.table(column), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        calibration_text(str(tmp_path / "a.parquet"))


def test_a_parquet_file_cut_short_or_with_a_damaged_page_is_refused(tmp_path: Path) -> None:
    rows = [f"row {i} {i * 7919 % 1013}" for i in range(20_000)]
    parquet.write_table(pa.table({"text": [*rows, None]}), tmp_path / "complete.parquet", use_dictionary=False)
    assert list(calibration_text(str(tmp_path / "complete.parquet")).documents) == rows
    data = bytearray((tmp_path / "complete.parquet").read_bytes())
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    data[100:4000] = b"\xff" * 3900
    (tmp_path / "damaged.parquet").write_bytes(data)
    for name in ("cut.parquet", "damaged.parquet"):
        with pytest.raises(ValueError, match="cannot be read as parquet") as caught:
            calibration_text(str(tmp_path / name))
        assert "\n" not in str(caught.value)
