"""What a checkpoint says about itself: config.json, the index, the headers of its weight files. Read here alone."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from slimgpt.files import exists

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
DOWNLOAD = "download or copy it again"


def raw_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it is stored, without transformers' defaults.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when the folder holds no config.json, or a damaged one, or pointers of git-lfs.
    """
    if not exists(folder) or not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; name the folder of a model")
    if not (folder / CONFIG).is_file():
        refuse_adapter(folder)
        raise ValueError(
            f"{folder} has no {CONFIG}: it is not a model folder, or its download or pruning is unfinished"
        )
    refuse_pointers(folder)
    return read_json(folder / CONFIG)


def weight_map(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, as the folder's index says; empty where it has none.

    Raises:
        ValueError: when the index is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise damaged(path, "it has no weight_map of file names")
    return files


def header(path: Path) -> dict[str, tuple[list[int], str, int]]:
    """Shape, dtype (as safetensors spells it) and first byte of every tensor in a file.

    Raises:
        ValueError: when the file is damaged or cut short.
    """
    try:
        with safe_open(path, framework="np"):  # checks the header, and that the file is as long as it says
            pass
        with path.open("rb") as raw:
            start = 8 + (length := int.from_bytes(raw.read(8), "little"))
            entries = json.loads(raw.read(length))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {_remedy(path, str(error))}") from None
    entries.pop("__metadata__", None)
    return {name: (e["shape"], e["dtype"], start + e["data_offsets"][0]) for name, e in entries.items()}


def read_json(path: Path, remedy: str = DOWNLOAD) -> dict[str, Any]:
    """Read one of a checkpoint's small files, which hold a JSON object each.

    Args:
        path: the file.
        remedy: for one that is damaged.

    Raises:
        ValueError: when it is not one; the message names the file, the place and the remedy.
    """
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:  # not UTF-8 or not JSON
        raise damaged(path, str(error), remedy) from None
    if not isinstance(data, dict):
        raise damaged(path, f"it holds a JSON {type(data).__name__}, not an object", remedy)
    return data


def refuse_pointers(folder: Path) -> None:
    """Without git-lfs, a clone holds pointers in place of large files, such as a tokenizer.

    Raises:
        ValueError: when one of the small files is a pointer; those of the weights are read anyway.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".py", ".txt") and path.is_file() and _is_pointer(path):
            raise damaged(path, "")


def refuse_adapter(folder: Path) -> None:
    """A LoRA adapter is not a model, and transformers would add it to the weights beside it.

    Raises:
        ValueError: when the folder holds one.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a LoRA adapter: merge it into its base model first (PEFT's merge_and_unload, then "
            "save_pretrained), and name the folder of the merged model"
        )


def damaged(path: Path, reason: str, remedy: str = DOWNLOAD) -> ValueError:
    """What to raise for one of a checkpoint's files: its name, the reason and the remedy in one line."""
    return ValueError(f"{path} is damaged: {_remedy(path, reason, remedy)}")


def _remedy(path: Path, reason: str, remedy: str = DOWNLOAD) -> str:
    if _is_pointer(path):
        return "it is a pointer of git-lfs; run git lfs pull"
    return f"{reason}; {remedy}"


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as raw:
        return raw.read(19) == b"version https://git"
