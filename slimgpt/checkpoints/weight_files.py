"""Which files of a folder hold a model's weights, and what to do where there are none to use."""

import json
import math
import shlex
from pathlib import Path

from slimgpt.checkpoints.headers import header, refuse_adapter, weight_map

SINGLE = "model.safetensors"
# As compressed-tensors names what it stores of a matrix.
PACKED, PER_INT32 = ".weight_packed", 8
BESIDE_QUANTISED = (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")


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


def count_parameters(folder: Path) -> int:
    """How many parameters the weight files hold, from their headers alone.

    Raises:
        ValueError: as ``weight_files`` and ``header`` raise.
    """
    tensors = [entry for name in weight_files(folder) for entry in header(folder / name).items()]
    # Of a quantised matrix its numbers count, not what scales them; eight of 4 bits lie in one int32.
    return sum(
        math.prod(shape) * (PER_INT32 if name.endswith(PACKED) else 1)
        for name, (shape, _, _) in tensors
        if not name.endswith(BESIDE_QUANTISED)
    )


def conversion(source: str, name: str, revision: str = "") -> str:
    """The command that turns a model of pickles into safetensors; torch reads them without running their code."""
    at, out = f", revision={json.dumps(revision)}" if revision else "", json.dumps(f"{name}-safetensors")
    return "python -c " + shlex.quote(
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f'M.from_pretrained({json.dumps(source)}{at}, use_safetensors=False, dtype="auto").save_pretrained({out}); '
        f"T.from_pretrained({json.dumps(source)}{at}).save_pretrained({out})"
    )
