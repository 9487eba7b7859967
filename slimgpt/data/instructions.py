"""Instructions with answers as recovery reads them: prompt and answer apart, since the answers alone are scored."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slimgpt.data.documents import Documents
from slimgpt.data.text import ALPACA, Origin, fetched
from slimgpt.data.text_files import SUFFIXES, read_answered
from slimgpt.files import exists, expanded


@dataclass(frozen=True)
class Instructions:
    """Prompts and their answers, in the file's order.

    Attributes:
        name, origin: as of a ``TextSource``.
        texts: a prompt in Alpaca's words, its answer, the next prompt, and so on, read again each time.
    """

    name: str
    origin: Origin
    texts: Documents

    @property
    def sha256(self) -> str:
        """Hex sha256 over prompts and answers."""
        return self.texts.sha256

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Prompts and their answers."""
        texts = iter(self.texts)
        return zip(texts, texts, strict=True)


def read_instructions(source: str) -> Instructions:
    """Read ``alpaca`` (local data, else the hub), or a .jsonl or .parquet file.

    Raises:
        FileNotFoundError: when it does not exist, or is neither local nor on a reachable hub.
        ValueError: for another kind of file, a row without the fields, or a file without an answer.
    """
    if source == "alpaca":
        path, origin = fetched(ALPACA)
        return Instructions("alpaca", origin, _texts(path))
    path = expanded(source)
    known = tuple(suffix for suffix in SUFFIXES if suffix not in (".txt", ".raw"))
    if not path.name.endswith(known):
        raise ValueError(f"instructions are {source!r}; they must be a {', '.join(known)} file, or alpaca")
    if not exists(path) or not path.is_file():
        raise FileNotFoundError(f"instructions {source!r} do not exist; name a file that does, or alpaca")
    return Instructions(path.name, "file", _texts(path))


def _texts(path: Path) -> Documents:
    return Documents(text for pair in read_answered(path) for text in pair)
