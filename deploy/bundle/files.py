"""The texts of a bundle's files, from the templates beside this file."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from deploy.engines import vllm_entry

# The release whose images are used. Both are built for x86-64 and arm64.
VLLM_VERSION = "0.32.0"
_BASE_IMAGES = {"gpu": f"vllm/vllm-openai:v{VLLM_VERSION}", "cpu": f"vllm/vllm-openai-cpu:v{VLLM_VERSION}"}
_HEALTHCHECK = "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"
_UID = 10001
_KVCACHE_GIB = 4
_CORES = 4


def render(template: str, **values: Any) -> str:
    """One of the templates with its values filled in; a value that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701  (no HTML: YAML, shell and markdown, whose values are checked)
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text: str = environment.get_template(template).render(**values)
    return text


def dns_label(name: str) -> str:
    """``name`` as Kubernetes, compose and images allow it: a letter, then letters, digits and dashes, 63 at most."""
    label = re.sub(r"[^a-z0-9]+", "-", name.rsplit("/", 1)[-1].lower()).strip("-")
    return (label if label[:1].isalpha() else f"model-{label}")[:63].rstrip("-")


def bundle_files(name: str, *, image: str, tag: str, weight_bytes: int, remote_code: bool) -> dict[str, str]:
    """File name -> text.

    Args:
        name: the model's name in requests.
        image: name of the image to build, with the registry it is pushed to, without a tag.
        tag: of the image; the CPU variant's is TAG-cpu.
        weight_bytes: of the weight files, for the limits of memory.
        remote_code: the model's classes are in the checkpoint.
    """
    label, weights_gib = dns_label(name), math.ceil(weight_bytes / 2**30)
    # vLLM's options by their long names. The start script's arguments win over them.
    settings = {"served-model-name": name, "host": "127.0.0.1", "port": 8000, "dtype": "auto"}
    files = {
        "serve.sh": render("serve.sh.j2", remote_code=remote_code, kvcache_gib=_KVCACHE_GIB),
        "serve.yaml": yaml.safe_dump(settings | {"generation-config": "auto"}, sort_keys=False),
        "vllm_entry.py": Path(vllm_entry.__file__).read_text(),
    }
    for variant, suffix in (("gpu", ""), ("cpu", ".cpu")):
        gpu = variant == "gpu"
        # GPU: the weights pass through the host's memory. CPU: weights, KV cache, three processes, shared memory.
        request, limit = (weights_gib + 4, 2 * weights_gib + 8) if gpu else (weights_gib + _KVCACHE_GIB + 6,) * 2
        names = {
            "containerfile": f"Containerfile{suffix}",
            "composefile": f"compose{suffix}.yaml",
            "manifest": f"kubernetes{suffix}.yaml",
        }
        values = {
            **names,
            "gpu": gpu,
            "label": label,
            "labels": f'{{app.kubernetes.io/name: "{label}"}}',
            "image": f"{image}:{tag}{'' if gpu else '-cpu'}",
            "base_image": _BASE_IMAGES[variant],
            "uid": _UID,
            "healthcheck": _HEALTHCHECK,
            "memory_request": request,
            "memory_limit": limit,
            "kvcache_gib": _KVCACHE_GIB,
            "cores": _CORES,
        }
        for kind, filename in names.items():
            template = {"containerfile": "Containerfile", "composefile": "compose.yaml", "manifest": "kubernetes.yaml"}
            files[filename] = render(f"{template[kind]}.j2", **values)
    return files
