"""Read tensors from safetensors shards, one by one, and write a shard atomically."""

import math
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from slimgpt.checkpoints.headers import INDEX, header, weight_map
from slimgpt.checkpoints.weight_files import weight_files
from slimgpt.files import commit, digest_of, file_sha256, remember_sha256

HASHED_AT_ONCE = 4  # files
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Checkpoints of old store it for every layer; transformers computes it from the config, and so does this package.
_COMPUTED = ".rotary_emb.inv_freq"


class Shards:
    """The tensors of a checkpoint folder, read one by one; only headers are read before a tensor is requested.

    Raises:
        ValueError: when the folder holds no safetensors weights, a damaged file or index, or quantised weights.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, str] = {}
        self._places: dict[str, tuple[list[int], torch.dtype, int]] = {}
        index = weight_map(folder)
        for file_name in weight_files(folder):
            for name, (shape, dtype, offset) in header(folder / file_name).items():
                if index.get(name, file_name) != file_name or name.endswith(_COMPUTED):
                    continue
                if dtype not in _DTYPES:
                    raise ValueError(
                        f"{folder / file_name} holds {name} as {dtype}, so the model is quantised; "
                        "take the full-precision model it was made from, and quantise the result"
                    )
                self.files[name], self._places[name] = file_name, (shape, _DTYPES[dtype], offset)
        lost = [name for name in index if name not in self.files and not name.endswith(_COMPUTED)]
        if lost:
            raise ValueError(
                f"{folder / index[lost[0]]} lacks {lost[0]}, which {INDEX} says it holds: download it again"
            )

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that start with ``prefix``."""
        return [name for name in self.files if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[list[int], torch.dtype]:
        """Shape and dtype of one tensor, from the header alone.

        Raises:
            ValueError: naming the tensor that the checkpoint lacks.
        """
        self._require([name])
        return self._places[name][:2]

    def load(self, names: list[str], device: torch.device | str = "cpu", *, pinned: bool = False) -> dict[str, Tensor]:
        """Read these tensors, each file opened once; ``pinned``: into memory that a GPU reads from by itself.

        Raises:
            ValueError: naming the tensor that the checkpoint lacks.
        """
        self._require(names)
        tensors = {}
        for file_name in dict.fromkeys(self.files[name] for name in names):
            with (self.folder / file_name).open("rb") as file:
                for name in names:
                    if self.files[name] == file_name:
                        tensors[name] = self._read(file, name, pinned).to(device)
        return tensors

    def _read(self, file: BinaryIO, name: str, pinned: bool) -> Tensor:
        """One tensor, read and not mapped: a private map of a file larger than memory is refused by the system."""
        shape, dtype, offset = self._places[name]
        tensor = torch.empty(shape, dtype=dtype, pin_memory=pinned)
        data = tensor.flatten().view(torch.uint8).numpy()
        file.seek(offset)
        if file.readinto(data) != data.nbytes:  # type: ignore[attr-defined]
            raise ValueError(f"{self.folder / self.files[name]} has become shorter while it was read")
        return tensor

    def _require(self, names: list[str]) -> None:
        absent = next((name for name in names if name not in self.files), None)
        if absent is None:
            return
        # Saved from the bare model (layers.0...) or from inside a wrapper (module.model.layers.0...).
        other = next((n for n in self.files if absent.endswith("." + n) or n.endswith("." + absent)), None)
        hint = ""
        if other:
            hint = (
                f", but {other}: it was saved from a part of the model or from a wrapper around it; "
                "save the entire AutoModelForCausalLM with save_pretrained"
            )
        raise ValueError(f"{self.folder} has no tensor {absent}{hint}")

    def size(self, names: list[str]) -> int:
        """Bytes of these tensors."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in map(self.shape, names))

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum((self.folder / name).stat().st_size for name in set(self.files.values()))

    def digest(self) -> str:
        """sha256 over the names and contents of all weight files (a second per GB; some files at a time)."""
        names = sorted(set(self.files.values()))
        with ThreadPoolExecutor(min(HASHED_AT_ONCE, len(names))) as threads:
            return digest_of(dict(zip(names, threads.map(file_sha256, map(self.folder.joinpath, names)), strict=True)))


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file atomically and return its sha256."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:  # as the umask has it; safetensors makes files for their owner alone
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"}
    )
    temporary.chmod(mode)
    sha256 = file_sha256(temporary)
    commit(temporary, path)
    remember_sha256(path, sha256)
    return sha256
