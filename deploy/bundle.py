"""A folder that serves a model anywhere vLLM runs: weights, settings, start script, container files, checksums.

OUT/model/            the checkpoint: safetensors, config, tokenizer and, for per-layer widths, slim_llama.py
OUT/serve.sh          starts vLLM with serve.yaml; further vLLM options follow it
OUT/serve.yaml        vLLM's settings (vllm serve --config)
OUT/vllm_entry.py     vLLM's command line for the CPU wheel too (a copy of deploy/vllm_entry.py)
OUT/Containerfile     image for NVIDIA GPUs; Containerfile.cpu without one
OUT/README.md         model card
OUT/MANIFEST.json     sha256 and bytes of every file; written last
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from deploy import vllm_entry
from deploy.bundle_files import CONTAINERFILE, CONTAINERFILE_CPU, SERVE_SH, model_card
from slimgpt.checkpoint import JOURNAL
from slimgpt.files import file_sha256, write_atomically

FORMAT = "slimgpt-bundle-1"
# Formats that run code when loaded.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


def write_bundle(model: Path, out: Path, *, name: str, report: dict[str, Any] | None = None) -> Path:
    """Write the bundle of ``model`` to ``out`` and return ``out``. It appears whole or not at all.

    Weights are hard links where the file system allows it (no second copy on disk), else copies.

    Args:
        model: folder of a checkpoint.
        out: new or empty folder, or an older bundle, which is replaced.
        name: the model's name in requests to the server.
        report: PruneReport.to_dict(), for the model card; read from ``model``/pruning.json where None.

    Raises:
        ValueError: ``model`` is not whole, or holds a pickle; ``out`` holds something else; ``name`` is no good name.
    """
    files = _checkpoint_files(model)
    _check_target(model, out)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", name):
        raise ValueError(f"name is {name!r}; use letters, digits and . _ - / only, for it goes into URLs and scripts")
    if report is None and (model / "pruning.json").is_file():
        report = json.loads((model / "pruning.json").read_text())
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    try:
        for file in files:
            target = partial / "model" / file.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(file.resolve(), target)  # the hub's cache holds links to its files
        remote_code = "auto_map" in json.loads((model / "config.json").read_text())
        texts = {
            "serve.sh": SERVE_SH.replace("@REMOTE_CODE@", "--trust-remote-code" if remote_code else ""),
            "serve.yaml": yaml.safe_dump(_settings(name), sort_keys=False),
            "vllm_entry.py": Path(vllm_entry.__file__).read_text(),
            "Containerfile": CONTAINERFILE,
            "Containerfile.cpu": CONTAINERFILE_CPU,
            "README.md": model_card(name, report),
        }
        for filename, text in texts.items():
            write_atomically(partial / filename, text)
        (partial / "serve.sh").chmod(0o755)
        partial.chmod(0o755)  # mkdtemp gives 0700, which a container's user could not enter
        manifest = {"format": FORMAT, "name": name, "files": _inventory(partial)}
        write_atomically(partial / "MANIFEST.json", json.dumps(manifest, indent=2) + "\n")
        _move_into_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def verify_bundle(folder: Path) -> list[str]:
    """What is wrong with a bundle, one line per file; empty when every file is as it was written, and none is new."""
    manifest = _manifest(folder)
    if manifest is None:
        return [f"{folder} has no readable MANIFEST.json of format {FORMAT}; it is not a whole bundle"]
    problems = []
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
        elif file_sha256(path) != expected["sha256"]:
            problems.append(f"{name}: content differs from the manifest (sha256)")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    unknown = present - {"MANIFEST.json"} - set(manifest["files"])
    problems += [f"{name}: not in the manifest" for name in sorted(unknown)]
    return problems


def _settings(name: str) -> dict[str, Any]:
    """Options of vLLM, by their long names. The start script's arguments win over them."""
    return {"served-model-name": name, "host": "127.0.0.1", "port": 8000, "dtype": "auto", "generation-config": "auto"}


def _checkpoint_files(model: Path) -> list[Path]:
    """Every file of a checkpoint but hidden ones and the journal of its making; whole and free of pickles."""
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} has no config.json; give the folder of a checkpoint, as `slimgpt prune` writes it")
    files = [
        path
        for path in sorted(model.rglob("*"))
        if path.is_file()
        and path.name != JOURNAL
        and not any(part.startswith(".") for part in path.relative_to(model).parts)
    ]
    if pickles := [path for path in files if path.suffix.lower() in PICKLES]:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code when loaded; save the model as safetensors and remove it"
        )
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(f"{model} holds no *.safetensors weights; is the download or prune complete?")
    index = model / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(shard for shard in shards if not (model / shard).is_file())
        if missing:
            raise ValueError(f"{model} lacks {len(missing)} of {len(shards)} shards, first {missing[0]}; make it again")
    return files


def _check_target(model: Path, out: Path) -> None:
    inside, outside = out.resolve(), model.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise ValueError(f"{out} and the model's folder {model} lie in each other; give a folder beside it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give the name of a new folder")
    if out.is_dir() and any(out.iterdir()) and _manifest(out) is None:
        raise ValueError(f"{out} holds something that is not a bundle of ours; give a new or empty folder")


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    return manifest


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _move_into_place(partial: Path, out: Path) -> None:
    """Rename ``partial`` to ``out``; an older bundle there leaves only when the new one has taken its place."""
    if not out.exists() or not any(out.iterdir()):
        partial.replace(out)  # POSIX renames onto an empty folder
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    out.replace(old)
    try:
        partial.replace(out)
    except OSError:
        old.replace(out)
        raise
    shutil.rmtree(old)
