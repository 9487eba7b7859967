"""Instructions with answers as recovery reads them: prompt and answer apart, since the answers alone are scored."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from slimgpt.data.text import ALPACA, Origin, fetched
from slimgpt.data.text_files import SUFFIXES, read_answered


@dataclass(frozen=True)
class Instructions:
    """Prompts and their answers, in the file's order.

    Attributes:
        name, origin: as of a ``TextSource``.
        pairs: prompt in Alpaca's words, and answer.
    """

    name: str
    origin: Origin
    pairs: list[tuple[str, str]]

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 over prompts and answers."""
        return hashlib.sha256("\0".join(text for pair in self.pairs for text in pair).encode()).hexdigest()


def read_instructions(source: str) -> Instructions:
    """Read ``alpaca`` (local data, else the hub), or a .jsonl or .parquet file.

    Raises:
        FileNotFoundError: when it does not exist, or is neither local nor on a reachable hub.
        ValueError: for another kind of file, a row without the fields, or a file without an answer.
    """
    if source == "alpaca":
        path, origin = fetched(ALPACA)
        return Instructions("alpaca", origin, list(read_answered(path)))
    path = Path(source).expanduser()
    known = tuple(suffix for suffix in SUFFIXES if suffix not in (".txt", ".raw"))
    if not path.name.endswith(known):
        raise ValueError(f"instructions are {source!r}; they must be a {', '.join(known)} file, or alpaca")
    if not path.is_file():
        raise FileNotFoundError(f"instructions {source!r} do not exist; name a file that does, or alpaca")
    return Instructions(path.name, "file", list(read_answered(path)))
