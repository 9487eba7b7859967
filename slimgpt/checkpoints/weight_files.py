"""Which files of a folder hold a model's weights, what is in them, and what to do where there are none to use."""

import json
import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_map(folder: Path) -> dict[str, str]:
    """Which file holds which tensor, as the folder's index says; empty where it has none.

    Raises:
        ValueError: when the index is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes())["weight_map"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: it is not JSON with a weight_map; download it again") from None


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the model: those that the index names, or the single one.

    Raises:
        ValueError: when there are none, some are missing, or there are two models, with the remedy.
    """
    refuse_adapter(folder)
    names = sorted(set(weight_map(folder).values())) or [SINGLE]
    if names != [SINGLE] and SINGLE not in names and (folder / SINGLE).is_file():
        raise ValueError(f"{folder} holds {SINGLE} and an index of other files: remove the one that is not the model")
    missing = [name for name in names if not (folder / name).is_file()]
    if names == [SINGLE] == missing:
        kinds = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors")
        names = sorted(path.name for kind in kinds for path in folder.glob(kind))
        raise ValueError(
            f"{folder} holds no safetensors weights"
            + (f" that transformers would load, only {names[0]}" if names else "")
            + (f"; convert it: {conversion(str(folder), folder.resolve().name)}" if (*folder.glob("*.bin"),) else "")
        )
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of its weight files, {missing[0]} first: download it again")
    return names


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


def conversion(source: str, name: str, revision: str = "") -> str:
    """The command that turns a model of pickles into safetensors; torch reads them without running their code."""
    at, out = f", revision={json.dumps(revision)}" if revision else "", json.dumps(f"{name}-safetensors")
    return "python -c " + shlex.quote(
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f'M.from_pretrained({json.dumps(source)}{at}, use_safetensors=False, dtype="auto").save_pretrained({out}); '
        f"T.from_pretrained({json.dumps(source)}{at}).save_pretrained({out})"
    )


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
        with path.open("rb") as raw:
            pointer = raw.read(19) == b"version https://git"
        remedy = "it is a pointer of git-lfs: run git lfs pull" if pointer else f"{error}; download or copy it again"
        raise ValueError(f"{path} is not a complete safetensors file ({remedy})") from None
    entries.pop("__metadata__", None)
    return {name: (e["shape"], e["dtype"], start + e["data_offsets"][0]) for name, e in entries.items()}
