"""Instructions with answers, as Alpaca has them: fields ``instruction``, ``input`` (may be empty) and ``output``."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from slimgpt.data.text import ALPACA, Origin, fetched
from slimgpt.data.text_files import SUFFIXES, read_rows

# The prompts of Alpaca, with which LLM-Pruner and SlimGPT recover.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


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
        return Instructions("alpaca", origin, _pairs(path))
    path = Path(source).expanduser()
    known = tuple(suffix for suffix in SUFFIXES if suffix not in (".txt", ".raw"))
    if not path.name.endswith(known):
        raise ValueError(f"instructions are {source!r}; they must be a {', '.join(known)} file, or alpaca")
    if not path.is_file():
        raise FileNotFoundError(f"instructions {source!r} do not exist; name a file that does, or alpaca")
    return Instructions(path.name, "file", _pairs(path))


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Those with an answer: some of Alpaca's have none."""
    pairs = [_pair(row, f"{str(path)!r} row {number}") for number, row in enumerate(read_rows(path), 1)]
    answered = [pair for pair in pairs if pair[1].strip()]
    if not answered:
        raise ValueError(f"{str(path)!r} holds no instruction with an answer; name a file that does")
    return answered


def _pair(row: dict[str, Any], place: str) -> tuple[str, str]:
    for name in ("instruction", "output"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{place} has no field {name!r} that is a text (it has: {', '.join(row)}); mend it")
    extra = row.get("input") or ""
    prompt = (_WITH_INPUT if extra.strip() else _WITHOUT_INPUT).format(instruction=row["instruction"], input=extra)
    return prompt, row["output"]
