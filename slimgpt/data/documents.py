"""Documents in bounded memory, however many there are: one at a time is held, a text file, which is one, entirely."""

import hashlib
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from slimgpt.data.chats import Chat
from slimgpt.files import TEMPORARY, writing

IN_MEMORY = 64 * 2**20  # bytes of text; what is more goes into a temporary file


class Documents(Sequence[str]):
    """Texts, each a ``str`` or a ``Chat``, read again from where they are kept each time one is requested.

    Args:
        texts: taken one after the other.

    Attributes:
        lengths: characters of each.
        sha256: over the texts, joined by a NUL character.

    Raises:
        OSError: where the temporary file has no room; the message names its folder and TMPDIR.
    """

    def __init__(self, texts: Iterable[str]):
        self.lengths, self._starts, self._chats = array("Q"), array("Q", [0]), bytearray()
        self._last: tuple[int, str] = -1, ""
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  gone with this object
        digest = hashlib.sha256()
        for text in texts:
            data = text.encode()
            digest.update(b"\0" + data if self.lengths else data)
            with writing("temporary files", Path(tempfile.gettempdir()), TEMPORARY):
                self._file.write(data)
            self.lengths.append(len(text))
            self._starts.append(self._starts[-1] + len(data))
            self._chats.append(isinstance(text, Chat))
        with writing("temporary files", Path(tempfile.gettempdir()), TEMPORARY):
            self._file.flush()
        self.sha256 = digest.hexdigest()

    @property
    def has_chats(self) -> bool:
        """Whether any of them is a conversation."""
        return any(self._chats)

    def is_chat(self, i: int) -> bool:
        """Whether document ``i`` is a conversation."""
        return bool(self._chats[i])

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]  # IndexError past the end; negative ones count from it
        if self._last[0] != i:  # a long document is read in passages
            self._file.seek(self._starts[i])
            text = self._file.read(self._starts[i + 1] - self._starts[i]).decode()
            self._last = i, Chat(text) if self._chats[i] else text
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))
