"""Token numbers of prompts with answers in little memory: a file's in a temporary file, those drawn in arrays."""

import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from slimgpt.data.documents import IN_MEMORY
from slimgpt.files import TEMPORARY, writing

Row = dict[str, Tensor]
UNSCORED = -100  # a label that the loss leaves out


class TokenFile:
    """Sequences of token numbers, in memory up to IN_MEMORY bytes, else in a temporary file.

    Attributes:
        lengths: tokens of each.
        unscored: how many of them, from the first on, the loss leaves out.

    Raises:
        OSError: where the temporary file has no room; the message names its folder and TMPDIR.
    """

    def __init__(self) -> None:
        self.lengths, self.unscored, self._starts = array("I"), array("I"), array("Q", [0])
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  gone with this object

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, ids: list[int], unscored: int) -> None:
        """Write one sequence behind the others."""
        data = array("I", ids).tobytes()
        with writing("temporary files", Path(tempfile.gettempdir()), TEMPORARY):
            self._file.write(data)
        self.lengths.append(len(ids))
        self.unscored.append(unscored)
        self._starts.append(self._starts[-1] + len(data))

    def rows(self, numbers: Sequence[int]) -> "Rows":
        """Read these sequences, in this order."""
        with writing("temporary files", Path(tempfile.gettempdir()), TEMPORARY):
            self._file.flush()
        rows = Rows()
        for i in numbers:
            self._file.seek(self._starts[i])
            rows.add(self._file.read(self._starts[i + 1] - self._starts[i]), self.unscored[i])
        return rows


class Rows(Sequence[Row]):
    """Sequences as Trainer takes them, made into tensors when they are read: four bytes a token until then."""

    def __init__(self) -> None:
        self._ids, self._ends, self._unscored = array("I"), array("Q", [0]), array("I")

    def add(self, ids: bytes, unscored: int) -> None:
        """Put one sequence behind the others: its numbers as an array has them."""
        self._ids.frombytes(ids)
        self._ends.append(len(self._ids))
        self._unscored.append(unscored)

    def __len__(self) -> int:
        return len(self._unscored)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]  # IndexError past the end; negative ones count from it
        ids_T = torch.tensor(self._ids[self._ends[i] : self._ends[i + 1]], dtype=torch.long)
        labels_T = ids_T.clone()
        labels_T[: self._unscored[i]] = UNSCORED
        return {"input_ids": ids_T, "labels": labels_T}
