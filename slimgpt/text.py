"""Where text comes from: what the user names, local data (SLIMGPT_DATA), the hub, or what every CPython carries.

In that order, never silently: ``TextSource`` says which it was, and reports and tables repeat it.
Local data is a folder that holds c4/train.jsonl, wikitext-2-raw/wiki.test.raw and wikitext-2-raw/wiki.train-head.raw.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from . import python_text
from .hub import hub_unreachable

DATA_VARIABLE = "SLIMGPT_DATA"
Origin = Literal["file", "local data", "hub", "python"]
SUFFIXES = (".jsonl", ".txt", ".raw", ".parquet")

# Pinned: a data set on the hub can change under its name, and its configurations have been renamed before.
C4_REVISION = "1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
C4_FIRST_SHARD = "en/c4-train.00000-of-01024.json.gz"
C4_DOCUMENTS = 20_000  # of the shard's 356,317: about 9 M tokens, enough for 4096 sequences of 2048
WIKITEXT_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Text and where it is from.

    Args:
        name: short name, part of metric names: "c4", "wikitext2", "python", or the file's name.
        documents: the text; one string holds a whole document, or a whole file that is one stream.
        sha256: over the documents, joined by a NUL character; of one document that is its file's own sum.
        origin: "file" (named by the user), "local data" (SLIMGPT_DATA), "hub" or "python".
    """

    name: str
    documents: list[str]
    sha256: str
    origin: Origin

    def __str__(self) -> str:
        return f"{self.name} ({self.origin}, sha256 {self.sha256[:12]})"


def calibration_text(source: str = "auto", *, revision: str = C4_REVISION) -> TextSource:
    """The text that calibration sequences are drawn from.

    Args:
        source: a .jsonl, .parquet (field ``text``), .txt or .raw file; "c4" or "wikitext" (local data, else the hub);
            "python"; or "auto": C4 where it can be had, else "python".
        revision: commit of the C4 data set on the hub.

    Raises:
        FileNotFoundError: there is no such file, or a data set that is neither local nor on a reachable hub.
        ValueError: a file of another kind, an empty one, or rows without a ``text`` field.
    """
    if source == "python" or (source == "auto" and _local("c4/train.jsonl") is None and hub_unreachable()):
        return _source("python", python_text.calibration_documents(), "python")
    if source in ("auto", "c4"):
        local = _local("c4/train.jsonl")
        if local:
            return _source("c4", _read(local), "local data")
        return _source("c4", _from_hub(_hub_c4, "c4", "c4/train.jsonl", revision), "hub")
    if source == "wikitext":
        path = "wikitext-2-raw/wiki.train-head.raw"
        local = _local(path)
        if local:
            return _source("wikitext", _read(local), "local data")
        return _source(
            "wikitext", _from_hub(partial(_hub_wikitext, "train"), "wikitext", path, WIKITEXT_REVISION), "hub"
        )
    return _file(source, "calibration", "c4, wikitext, python or auto")


def perplexity_text(name: str = "auto", *, revision: str = WIKITEXT_REVISION) -> TextSource:
    """The text that perplexity is measured on, as one stream.

    Args:
        name: "wikitext2" (the raw test split: local data, else the hub); "python" (the part that calibration does not
            see); a file as for ``calibration_text``, whose documents are joined by blank lines; or "auto": WikiText-2
            where it can be had, else "python".
        revision: commit of the WikiText data set on the hub.

    Returns:
        a TextSource with exactly one document.

    Raises:
        FileNotFoundError, ValueError: as for ``calibration_text``.
    """
    path = "wikitext-2-raw/wiki.test.raw"
    local = _local(path)
    if name == "python" or (name == "auto" and local is None and hub_unreachable()):
        return _source("python", ["\n\n".join(python_text.held_out_documents())], "python")
    if name in ("auto", "wikitext2"):
        if local:
            return _source("wikitext2", _read(local), "local data")
        return _source("wikitext2", _from_hub(partial(_hub_wikitext, "test"), "wikitext2", path, revision), "hub")
    named = _file(name, "perplexity", "wikitext2, python or auto")
    return _source(named.name, ["\n\n".join(named.documents)], "file")


def local_data() -> Path | None:
    """The folder that SLIMGPT_DATA names, or None where it is not set.

    Raises:
        FileNotFoundError: it names something that is not a folder.
    """
    folder = os.environ.get(DATA_VARIABLE, "")
    if folder and not Path(folder).is_dir():
        raise FileNotFoundError(f"{DATA_VARIABLE} is {folder!r}, which is not a folder; correct it or unset it")
    return Path(folder) if folder else None


def _local(path: str) -> Path | None:
    folder = local_data()
    return folder / path if folder and (folder / path).is_file() else None


def _from_hub(read: Callable[[str], list[str]], name: str, path: str, revision: str) -> list[str]:
    reason = hub_unreachable()
    if not reason:
        try:
            return read(revision)
        except Exception as error:  # the hub's, datasets' and HTTP's errors share no class
            reason = f"the hub does not give it ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    raise FileNotFoundError(
        f"{name} is not at hand: {reason}, and {DATA_VARIABLE} names no folder that holds {path}; "
        f"set {DATA_VARIABLE}, name a {'/'.join(SUFFIXES)} file, or use 'python' (text that Python carries)"
    )


def _source(name: str, documents: list[str], origin: Origin) -> TextSource:
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    return TextSource(name=name, documents=documents, sha256=digest, origin=origin)


def _file(source: str, purpose: str, names: str) -> TextSource:
    path = Path(source)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{purpose} text is {source!r}; it must be a {', '.join(SUFFIXES)} file, or {names}")
    if not path.is_file():
        raise FileNotFoundError(f"{purpose} text {source!r} does not exist; name a file that does, or {names}")
    return _source(path.name, _read(path), "file")


def _read(path: Path) -> list[str]:
    """The documents of a file, blank ones left out. Text files are one document, byte for byte."""
    try:
        if path.suffix == ".parquet":
            documents = _read_parquet(path)
        elif path.suffix == ".jsonl":
            documents = _read_jsonl(path)
        else:
            documents = [path.read_bytes().decode()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text (byte {error.start}); convert it first") from error
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"{str(path)!r} holds no text; name a file that does")
    return documents


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{str(path)!r} line {number} is not JSON ({error.msg}); a .jsonl file holds one object a line"
                ) from error
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{str(path)!r} line {number} has no field 'text' (it has: {has}); rename the field")
            documents.append(text)
    return documents


def _read_parquet(path: Path) -> list[str]:
    import pyarrow as pa  # comes with datasets; a fifth of a second to import
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as parquet: {str(error).splitlines()[0]}") from error
    with table:
        columns = table.schema_arrow.names
        if "text" not in columns:
            raise ValueError(f"{str(path)!r} has no column 'text' (it has: {', '.join(columns)}); rename the column")
        rows = table.read(columns=["text"]).column("text").to_pylist()
    wrong = next((row for row in rows if row is not None and not isinstance(row, str)), None)
    if wrong is not None:
        raise ValueError(f"{str(path)!r} has a column 'text' of {type(wrong).__name__}; it must hold strings")
    return [row for row in rows if row is not None]


def _hub_c4(revision: str) -> list[str]:
    from datasets import load_dataset  # a second to import

    # Streamed: the first documents of a shard of 320 MB are a small part of it.
    rows = load_dataset(
        "allenai/c4", data_files={"train": C4_FIRST_SHARD}, split="train", revision=revision, streaming=True
    )
    return [row["text"] for row in rows.take(C4_DOCUMENTS)]


def _hub_wikitext(split: str, revision: str) -> list[str]:
    from datasets import load_dataset  # a second to import

    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split, revision=revision)
    return [join_wikitext_rows(rows["text"])]


def join_wikitext_rows(rows: list[str]) -> str:
    """The raw file that the hub's rows were made from: its lines, where a line of blanks became an empty row."""
    return "".join(row or " \n" for row in rows)
