"""Documents of any number: what went in comes out, in memory that does not grow with them."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest

from slimgpt.data import documents
from slimgpt.data.chats import Chat
from slimgpt.data.documents import Documents
from slimgpt.data.text import calibration_text

TEXTS = [
    "first",
    "zweiter, mit Umlaut: ü",
    "\U0001f600 four bytes",
    Chat(json.dumps([{"role": "user", "content": "é"}])),
]


@pytest.mark.parametrize("in_memory", [1, 2**20])
def test_they_come_out_as_they_went_in_and_in_any_order(monkeypatch, in_memory):
    monkeypatch.setattr(documents, "IN_MEMORY", in_memory)
    kept = Documents(iter(TEXTS))
    assert list(kept) == TEXTS
    assert [kept[i] for i in (2, 0, -1, 1)] == [TEXTS[i] for i in (2, 0, -1, 1)]
    assert kept[1:3] == TEXTS[1:3]
    assert list(kept.lengths) == [len(text) for text in TEXTS]
    assert [type(text) for text in kept] == [str, str, str, Chat]
    assert kept.sha256 == hashlib.sha256("\0".join(TEXTS).encode()).hexdigest()
    with pytest.raises(IndexError):
        kept[4]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(documents, "IN_MEMORY", 2**20)
    path, rows = tmp_path / f"large.{kind}", [f"{i} " + "word " * 200 for i in range(20_000)]
    write(path, rows)
    total = sum(map(len, rows))
    del rows
    tracemalloc.start()
    text = calibration_text(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text.documents[19_999].startswith("19999 word")
    assert sum(text.documents.lengths) == total > 20e6
    assert peak < total / 4


def write(path: Path, rows: list[str]) -> None:
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"text": rows}), path, row_group_size=1000)
        return
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        import gzip

        lines = gzip.compress(lines, 1)
    path.write_bytes(lines)


def test_a_full_disk_for_temporary_files_is_named(small_disk, monkeypatch):
    monkeypatch.setattr(documents, "IN_MEMORY", 2**10)
    with small_disk("1M") as place:
        monkeypatch.setattr("tempfile.tempdir", str(place))
        with pytest.raises(OSError, match=f"{place}.*TMPDIR can name another folder"):
            Documents("x" * 2**18 for _ in range(10))
