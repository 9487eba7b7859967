"""Reading layers from safetensors shards, writing pruned shards and a journal that survive a crash at any moment.

A folder under construction holds finished shards and journal.jsonl but no config.json and no index, so nothing can take
it for a model. Those two are written last.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from .files import commit, file_sha256, write_atomically
from .weight_files import INDEX, header, weight_files, weight_map

JOURNAL = "journal.jsonl"
TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer
# What came with the dense model and is still true goes along untouched. Not so: weights in any format, what describes
# them or how they were made, code (the pruned architecture brings its own), and figures of the dense model.
NOT_COPIED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx*", "*.h5", "*.msgpack", "*.index.json"),
    *("config.json", "params.json", "pruning.json", "trainer_state.json", "*_results.json", "README.md", "*.py"),
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Checkpoints of old store it for every layer; transformers computes it from the config, and so does this package.
_COMPUTED = ".rotary_emb.inv_freq"


class Shards:
    """The tensors of a checkpoint folder, read one by one; only headers are read before a tensor is asked for.

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
                        "prune the full-precision model it was made from, then quantise the result"
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

    def load(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read these tensors, each file opened once.

        Raises:
            ValueError: naming the tensor that the checkpoint lacks.
        """
        self._require(names)
        tensors = {}
        for file_name in dict.fromkeys(self.files[name] for name in names):
            with (self.folder / file_name).open("rb") as file:
                for name in names:
                    if self.files[name] == file_name:
                        tensors[name] = self._read(file, name).to(device)
        return tensors

    def _read(self, file: BinaryIO, name: str) -> Tensor:
        """One tensor, read and not mapped: a private map of a file larger than memory is refused by the system."""
        shape, dtype, offset = self._places[name]
        tensor = torch.empty(shape, dtype=dtype)
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
                "save the whole AutoModelForCausalLM with save_pretrained"
            )
        raise ValueError(f"{self.folder} has no tensor {absent}{hint}")

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


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer files, chat templates, generation config, licence and the like, byte for byte.

    Only a tokenizer's pointer to code of its own (auto_map) is left out, as the code is.
    """
    here = [path for path in source.iterdir() if not any(path.match(pattern) for pattern in NOT_COPIED)]
    for path in sorted([*here, *(source / TEMPLATES).glob("*.jinja")]):
        if not path.is_file() or path.name.startswith("."):
            continue
        target = out / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        shutil.copyfile(path, temporary)
        temporary.replace(target)
        if path.name == "tokenizer_config.json" and "auto_map" in (settings := json.loads(path.read_bytes())):
            del settings["auto_map"]
            write_atomically(target, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
