"""Read the documents of a file, one after the other: .jsonl, also compressed, .parquet, .txt and .raw."""

import io
import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from slimgpt.data.chats import CHAT_FIELDS, chat_of
from slimgpt.data.prompts import INSTRUCTION_FIELDS, prompt_and_answer

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".txt", ".raw", ".parquet")
ROWS = 1024  # of a parquet file, read at a time
_ELSE = f"{', '.join(CHAT_FIELDS)}, or {' and '.join(INSTRUCTION_FIELDS)}"  # what a row without text may have


def read_documents(path: Path, limit: int | None = None) -> Iterator[str]:
    """The documents of a file, of its first ``limit`` rows where it is given; blank ones are left out.

    Text files are one document, as it stands but for a leading BOM. A row without ``text`` can be a ``Chat``, else an
    instruction with its answer: Alpaca's prompt and the answer behind it. One without an answer counts as blank.

    Raises:
        ValueError: naming the file, when it is damaged, holds no text, or rows without such a field.
    """
    if path.suffix == ".parquet":
        documents = read_parquet(path)
    elif path.suffix in (".txt", ".raw"):
        documents = iter([_decoded(path.read_bytes(), repr(str(path)))])
    else:
        documents = _read_jsonl(path)
    empty = True
    for document in islice(documents, limit):
        if document.strip():
            empty = False
            yield document
    if empty:
        raise ValueError(f"{str(path)!r} holds no text; name a file that does")


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")  # some editors begin a file with a BOM, which is not text
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text (byte {error.start}); convert it first") from None


def _read_jsonl(path: Path) -> Iterator[str]:
    """The text, conversation, or instruction with its answer, of every line."""
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):
                yield _text_of(line, f"{str(path)!r} line {number}") if line.strip() else ""
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}; copy or download it again") from None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every row of a .jsonl or .parquet file, with all its fields.

    Raises:
        ValueError: naming the file, when it is damaged or a row is no object.
    """
    if path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as table:
                for batch in table.iter_batches(ROWS):
                    yield from batch.to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{str(path)!r} cannot be read as parquet: {str(error).splitlines()[0]}") from error
        return
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _object(line, f"{str(path)!r} line {number}")
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}; copy or download it again") from None


def _object(line: bytes, place: str) -> dict[str, Any]:
    text = _decoded(line, place)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and brackets within brackets
        reason = str(getattr(error, "msg", error))
        raise ValueError(f"{place} is not JSON ({reason}); such a file holds one object per line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place} is a {type(row).__name__}; such a file holds one object per line")
    return row


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".jsonl":
        return path.open("rb")
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="detect"))


def _text_of(line: bytes, place: str) -> str:
    row = _object(line, place)
    text = row.get("text")
    if text is None:
        text = chat_of(row, place)
    if text is None and _has_instruction(row):
        text = _answered(row, place)
    if not isinstance(text, str):
        raise ValueError(
            f"{place} has no field 'text' that is a string, nor {_ELSE} (it has: {', '.join(row)}); rename the field"
        )
    return _encodable(text, place)


def _encodable(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place} holds half of a surrogate pair (\\ud800 to \\udfff alone); remove it") from None
    return text


def _has_instruction(fields: Collection[str]) -> bool:
    return all(name in fields for name in INSTRUCTION_FIELDS)


def _answered(row: dict[str, Any], place: str) -> str:
    """Prompt and answer as one text; empty where there is no answer."""
    prompt, answer = prompt_and_answer(row, place)
    return prompt + answer if answer.strip() else ""


def read_answered(path: Path) -> Iterator[tuple[str, str]]:
    """Prompts and answers of a .jsonl or .parquet file of instructions, by these fields whatever others it has.

    Those without an answer are left out: Alpaca has some.

    Raises:
        ValueError: naming the file, when it is damaged, a row lacks a field, or none has an answer.
    """
    empty = True
    for number, row in enumerate(read_rows(path), 1):
        place = f"{str(path)!r} row {number}"
        prompt, answer = prompt_and_answer(row, place)
        if answer.strip():
            empty = False
            yield _encodable(prompt, place), _encodable(answer, place)
    if empty:
        raise ValueError(f"{str(path)!r} holds no instruction with an answer; name a file that does")


def read_parquet(path: Path) -> Iterator[str]:
    """The column ``text``, else the conversations, else instructions with answers; an empty row is an empty text.

    Raises:
        ValueError: when it is damaged, or without such a column.
    """
    import pyarrow as pa  # a fifth of a second to import
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            wanted = next(([name] for name in ("text", *CHAT_FIELDS) if name in columns), [])
            if not wanted and _has_instruction(columns):
                wanted = [name for name in (*INSTRUCTION_FIELDS, "input") if name in columns]
            if not wanted:
                raise ValueError(
                    f"{str(path)!r} has no column 'text', nor {_ELSE} (it has: {', '.join(columns)}); rename the column"
                )
            batches = table.iter_batches(ROWS, columns=wanted)
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield _text_of_row(row, path, number)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _text_of_row(row: dict[str, Any], path: Path, number: int) -> str:
    if "text" not in row:
        place = f"{str(path)!r} row {number}"
        return _answered(row, place) if _has_instruction(row) else chat_of(row, place) or ""
    text = row["text"]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{str(path)!r} has a column 'text' of {type(text).__name__}; it must hold strings")
    return text or ""
