"""The files beside the weights: which go along with a pruned model, byte for byte."""

import json
import os
import shutil
from pathlib import Path

from slimgpt.checkpoints.headers import read_json
from slimgpt.files import write_atomically

TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer
# What came with the dense model and is still true goes along untouched. Not so: weights in any format, what describes
# them or how they were made, code (the pruned architecture brings its own), and figures of the dense model.
NOT_COPIED = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx*", "*.h5", "*.msgpack", "*.index.json"),
    *("config.json", "params.json", "trainer_state.json", "*_results.json", "README.md", "*.py"),
    # of a model that is pruned or trained once more: how it was made, and its figures
    *("pruning.json", "lineage.json", "recovery.json", "quantization.json", "evaluation.json", "journal.jsonl"),
)


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer files, chat templates, generation config, licence and the like, byte for byte.

    Only a tokenizer's pointer to code of its own (auto_map) is left out, as the code is.
    """
    for path, target in zip(_going_along(source), companions(source, out), strict=True):
        target.parent.mkdir(exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        shutil.copyfile(path, temporary)
        temporary.replace(target)
        if path.name == "tokenizer_config.json" and "auto_map" in (settings := read_json(path)):
            del settings["auto_map"]
            write_atomically(target, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def check_readable(source: Path) -> None:
    """Refuse a model of which a file that goes along cannot be read: they are copied last, after the long work.

    Raises:
        PermissionError: naming the first such file.
    """
    for path in _going_along(source):
        if not os.access(path, os.R_OK):
            raise PermissionError(
                f"{path} goes along with the model, and this user cannot read it; change its permissions, or move it"
            )


def companions(source: Path, out: Path) -> list[Path]:
    """Where ``copy_companions`` puts them."""
    return [out / path.relative_to(source) for path in _going_along(source)]


def _going_along(source: Path) -> list[Path]:
    here = [path for path in source.iterdir() if not any(path.match(pattern) for pattern in NOT_COPIED)]
    found = sorted([*here, *(source / TEMPLATES).glob("*.jinja")])
    return [path for path in found if path.is_file() and not path.name.startswith(".")]
