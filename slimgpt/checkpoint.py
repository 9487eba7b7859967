"""Reading layers from safetensors shards, writing pruned shards and a journal that survive a crash at any moment.

A folder under construction holds finished shards and journal.jsonl but no config.json and no index, so nothing can take
it for a model. Those two are written last.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import commit, file_sha256, write_atomically

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
JOURNAL = "journal.jsonl"
# What came with the dense model and is still true goes along untouched; weights and what describes them do not.
NOT_COPIED = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.index.json",
    "config.json",
    "*.py",
    "pruning.json",
)


class Shards:
    """The tensors of a checkpoint folder, read one by one; nothing is loaded before it is asked for.

    Raises:
        ValueError: when the folder holds no safetensors weights, or an index that names missing files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        if index.is_file():
            self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), SINGLE)
        else:
            pickles = sorted(p.name for p in folder.glob("*.bin"))
            found = f"only pickles ({pickles[0]}, ...), which can run code when read" if pickles else "none"
            raise ValueError(
                f"{folder} holds no safetensors weights: {found}. Save the model with transformers 5's "
                "save_pretrained, or download the safetensors files"
            )
        missing = sorted({name for name in self.files.values() if not (folder / name).is_file()})
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of its weight files, {missing[0]} first: download it again"
            )

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that start with ``prefix``."""
        return [name for name in self.files if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of one tensor, from the header alone."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            part = file.get_slice(name)
            return part.get_shape(), _DTYPES[part.get_dtype()]

    def load(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read these tensors, each file opened once.

        Raises:
            ValueError: naming the tensor that the checkpoint lacks.
        """
        absent = [name for name in names if name not in self.files]
        if absent:
            raise ValueError(f"{self.folder} has no tensor {absent[0]}")
        tensors = {}
        for file_name in dict.fromkeys(self.files[name] for name in names):
            with safe_open(self.folder / file_name, framework="pt", device=str(device)) as file:
                for name in names:
                    if self.files[name] == file_name:
                        tensors[name] = file.get_tensor(name)
        return tensors

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum((self.folder / name).stat().st_size for name in set(self.files.values()))

    def digest(self) -> str:
        """sha256 over the names and contents of all weight files (about a second per GB)."""
        total = hashlib.sha256()
        for name in sorted(set(self.files.values())):
            total.update(f"{name} {file_sha256(self.folder / name)}\n".encode())
        return total.hexdigest()


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file atomically and return its sha256."""
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"}
    )
    sha256 = file_sha256(temporary)
    commit(temporary, path)
    return sha256


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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however it ends.

    Raises:
        BlockingIOError: when another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)  # the folder itself, so that no lock file is left in it
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process is writing to {folder}; wait for it or choose another OUT"
            ) from None
        yield
    finally:
        os.close(handle)


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer files, chat template, generation config, licence and the like, byte for byte."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not any(path.match(pattern) for pattern in NOT_COPIED):
            temporary = out / (path.name + ".tmp")
            shutil.copyfile(path, temporary)
            temporary.replace(out / path.name)
