"""A folder that serves a model anywhere vLLM runs: weights, settings, start script, container files, checksums.

OUT/model/            the checkpoint: safetensors, config, tokenizer and, for per-layer widths, the code of its classes
OUT/serve.sh          starts vLLM with serve.yaml; further vLLM options follow it
OUT/serve.yaml        vLLM's settings (vllm serve --config)
OUT/vllm_entry.py     vLLM's command line for the CPU wheel too (a copy of deploy/engines/vllm_entry.py)
OUT/Containerfile     image for NVIDIA GPUs with the model in it; without a GPU: Containerfile.cpu
OUT/compose.yaml      that image with a health check; compose.cpu.yaml
OUT/kubernetes.yaml   that image as Deployment and Service; kubernetes.cpu.yaml
OUT/README.md         model card; also in model/, which can go to the hub as it is
OUT/MANIFEST.json     sha256 and bytes of every file; written last
"""

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

from deploy.bundle.card import model_card
from deploy.bundle.files import bundle_files, dns_label
from deploy.engines.tensor_parallel import family_config, tensor_parallel_sizes
from slimgpt.checkpoints.headers import damaged, raw_config, read_json
from slimgpt.checkpoints.lineage import check_output, check_parameters, checkpoint_digest, load_lineage
from slimgpt.checkpoints.weight_files import weight_files
from slimgpt.engine.journal import JOURNAL
from slimgpt.files import file_sha256, partial_folder, write_atomically, writing
from slimgpt.report import REPORT, load_report

FORMAT = "slimgpt-bundle-1"
MANIFEST = "MANIFEST.json"
EVALUATION = "evaluation.json"  # in the checkpoint: EvalResult.to_dict() of "dense" and "pruned"
# What a card says of an evaluation, and the kind of each in JSON.
_EVALUATED = {"metrics": dict, "config": dict, "results": dict, "versions": dict, "dtype": str, "device": str}
# Formats that run code when loaded.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
# The same weights once more, for other programs.
OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")


def write_bundle(
    model: Path,
    out: Path,
    *,
    name: str,
    image: str = "",
    evaluations: Mapping[str, dict[str, Any]] | None = None,
) -> Path:
    """Write the bundle of ``model`` to ``out`` and return ``out``. It appears complete or not at all.

    Weights are hard links where the file system allows it (no second copy on disk), else copies.

    Args:
        model: folder of a checkpoint.
        out: new or empty folder, or an older bundle, which is replaced; of a link the folder it leads to.
        name: the model's name in requests to the server.
        image: name of the container image, with its registry (ghcr.io/me/tiny); the model's where empty.
        evaluations: ``EvalResult.to_dict()`` of "dense" and "pruned"; read from ``model``/evaluation.json where None.

    Raises:
        ValueError: ``model`` is incomplete, is not the model of its lineage or of the evaluations, or holds a pickle;
            ``out`` holds something else, or cannot be replaced; ``name`` or ``image`` is not a valid name.
        OSError: the disk has no room for it; the message names the folder and the remedy.
    """
    files = _checkpoint_files(model)
    _check_target(model, out)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]*", name):
        raise ValueError(f"name is {name!r}; use only letters, digits and . _ - /, since URLs and scripts contain it")
    image = image or dns_label(name)
    if not re.fullmatch(r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)*", image) or ":" in image.rsplit("/", 1)[-1]:
        raise ValueError(f"image is {image!r}; use lower-case letters, as in ghcr.io/me/tiny, without a tag")
    lineage = load_lineage(model)
    if (model / REPORT).is_file():
        load_report(model)  # a damaged one would go along
    check_parameters(lineage, model)
    digest = checkpoint_digest(model)
    check_output(lineage, digest, model)
    if evaluations is None:
        evaluations = _read_evaluations(model / EVALUATION) if (model / EVALUATION).is_file() else {}
    if evaluations and evaluations["pruned"].get("digest", "") not in ("", digest):
        raise ValueError(
            f"the figures for {model} ({EVALUATION}) were measured of another model: evaluate this one, "
            f"or remove {EVALUATION}"
        )
    remote_code = _carries_code(model)
    place = out.resolve()  # a rename would replace a link, and refuses "."
    with writing("the bundle", place.parent), partial_folder(place) as partial:
        for file in files:
            target = partial / "model" / file.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(file.resolve(), target)  # the hub's cache holds links to its files
        if evaluations:
            write_atomically(partial / "model" / EVALUATION, json.dumps(evaluations, indent=2) + "\n")
        tag = hashlib.sha256(json.dumps(_inventory(partial)).encode()).hexdigest()[:12]
        card = model_card(
            name,
            model,
            image=f"{image}:{tag}",
            remote_code=remote_code,
            tensor_parallel=_tensor_parallel(model),
            lineage=lineage,
            evaluations=evaluations,
        )
        weight_bytes = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
        texts = bundle_files(name, image=image, tag=tag, weight_bytes=weight_bytes, remote_code=remote_code)
        for filename, text in {**texts, "README.md": card, "model/README.md": card}.items():
            write_atomically(partial / filename, text)
        (partial / "serve.sh").chmod(0o755)
        partial.chmod(0o755)  # mkdtemp gives 0700, which a container's user could not enter
        manifest = {"format": FORMAT, "name": name, "files": _inventory(partial)}
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        _move_into_place(partial, place)
    return out


def verify_bundle(folder: Path) -> list[str]:
    """What is wrong with a bundle, one line per file; empty when every file is as it was written, and none is new."""
    manifest = _manifest(folder)
    if manifest is None:
        return [f"{folder} has no readable {MANIFEST} of format {FORMAT}; it is not a complete bundle"]
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
    unknown = present - {MANIFEST} - set(manifest["files"])
    problems += [f"{name}: not in the manifest" for name in sorted(unknown)]
    return problems


def _checkpoint_files(model: Path) -> list[Path]:
    """Every file of a checkpoint but hidden ones and the journal of its making; complete and free of pickles."""
    raw_config(model)
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
    if others := [path for path in files if path.suffix.lower() in OTHER_WEIGHTS]:
        raise ValueError(
            f"{others[0]} holds weights that vLLM would not read; remove it, a bundle has *.safetensors only"
        )
    weight_files(model)  # raises where one is missing
    return files


def _check_target(model: Path, out: Path) -> None:
    inside, outside = out.resolve(), model.resolve()
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise ValueError(f"{out} and the model's folder {model} overlap; name a folder outside it")
    if os.path.lexists(out) and not out.is_dir():
        what = "file" if out.exists() else "link to nothing"
        raise ValueError(f"{out} is a {what}; give the name of a new folder")
    if out.is_dir() and any(out.iterdir()) and _manifest(out) is None:
        raise ValueError(f"{out} is not empty and not a slimgpt bundle; name a new or empty folder")
    if _is_mounted(inside):
        raise ValueError(f"{out} is a mount point, which cannot be replaced; name a new folder in it, {out / 'bundle'}")
    if inside == (here := Path.cwd()) or inside in here.parents:
        raise ValueError(f"{out} is the current folder, or holds it, and is replaced as a whole; start from outside it")


def _is_mounted(place: Path) -> bool:
    """Whether something is mounted there; of a folder of the same disk only Linux's own list says so."""
    listed = Path("/proc/self/mountinfo")
    lines = listed.read_text(errors="replace").splitlines() if listed.is_file() else []
    return os.path.ismount(place) or str(place).replace(" ", "\\040") in (line.split()[4] for line in lines)


def _carries_code(model: Path) -> bool:
    """Whether the config names classes in files beside it. All of these, and what they import, must be there."""
    named = raw_config(model).get("auto_map", {}).values()
    # MODULE.CLASS, or REPO--MODULE.CLASS where the code lies elsewhere; of a tokenizer two, of which one may be null.
    classes = [name for value in named for name in (value if isinstance(value, list) else [value]) if name]
    waiting, modules = [name.rpartition(".")[0] for name in classes], set[str]()
    while waiting:
        if (module := waiting.pop()) in modules:
            continue
        file = model / f"{module}.py"
        if not file.is_file():
            raise ValueError(
                f"{model} lacks {file.name}, a file of the code that its config.json names (auto_map); "
                "copy it from the original model"
            )
        modules.add(module)
        waiting += get_relative_imports(file)
    return bool(modules)


def _tensor_parallel(model: Path) -> list[int]:
    """The sizes that divide every layer; empty where the family is not ours."""
    config = family_config(model)
    return tensor_parallel_sizes(config) if config else []


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    files = manifest.get("files")
    complete = isinstance(files, dict) and all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in files.values()
    )
    return manifest if complete else None


def _read_evaluations(file: Path) -> dict[str, Any]:
    """The figures beside a model, whose card needs them; {} where the file holds none."""
    evaluations = read_json(file)
    for side in ("dense", "pruned") if evaluations else ():
        figures = evaluations.get(side)
        if not isinstance(figures, dict):
            raise damaged(file, f"it has no figures of the {side} model")
        if lacking := [name for name, kind in _EVALUATED.items() if not isinstance(figures.get(name), kind)]:
            raise damaged(file, f"the figures of the {side} model have no {lacking[0]}")
        if odd := [name for name, value in figures["metrics"].items() if not isinstance(value, int | float)]:
            raise damaged(file, f"{odd[0]} of the {side} model is no number")
    return evaluations


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
        _remove_old(out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    try:
        out.replace(old)
    except OSError:
        old.rmdir()
        raise
    try:
        partial.replace(out)
    except OSError:
        old.replace(out)
        raise
    _remove_old(out)


def _remove_old(out: Path) -> None:
    """Remove the bundle that ``out`` was before; also one that a process killed in the middle of this left."""
    for old in out.parent.glob(f"{glob.escape(f'.{out.name}.old-')}*"):
        shutil.rmtree(old)
