"""The journal of a pruning, which survives a crash at any moment: what is finished, and of which run.

A folder under construction holds finished shards and journal.jsonl but no config.json and no index, so nothing can take
it for a model. Those two are written last.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from slimgpt.files import write_atomically

JOURNAL = "journal.jsonl"


class Journal:
    """What is finished, one JSON object a line, each with its own checksum; the first line says what is being made.

    A line is written after its shard is on disk. A torn last line, or a shard whose sha256 is not the recorded one,
    counts as not done.
    """

    def __init__(self, folder: Path):
        self.path = folder / JOURNAL

    def read(self) -> list[dict[str, Any]]:
        """The intact lines up to the first damaged one."""
        entries: list[dict[str, Any]] = []
        if not self.path.is_file():
            return entries
        for line in self.path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                claimed = entry.pop("line_sha256")
            except (ValueError, KeyError, AttributeError):
                break
            if claimed != _line_sha256(entry):
                break
            entries.append(entry)
        return entries

    def rewrite(self, entries: list[dict[str, Any]]) -> None:
        """Replace the journal by these entries."""
        write_atomically(self.path, b"".join(_line(entry) for entry in entries))

    def append(self, entry: dict[str, Any]) -> None:
        """Add one line and flush it to disk."""
        with self.path.open("ab") as file:
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())


def _line_sha256(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps({**entry, "line_sha256": _line_sha256(entry)}, sort_keys=True).encode() + b"\n"
