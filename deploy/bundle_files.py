"""The texts of a bundle's files."""

from pathlib import PurePath
from typing import Any

# Images of the vLLM release that is tested. The GPU image is for x86-64 and arm64, the CPU image too.
VLLM_VERSION = "0.32.0"

SERVE_SH = """\
#!/bin/sh
# Serve the model beside this script: ./serve.sh [vLLM options, e.g. --port 9000 --host 0.0.0.0]
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
has_plugin='from importlib.metadata import entry_points
raise SystemExit("slimgpt" not in entry_points(group="vllm.general_plugins").names)'
# With the slimgpt package vLLM knows the model by itself. Without it, vLLM runs the model code in this bundle.
remote_code=@REMOTE_CODE@
if "$python" -c "$has_plugin" 2>/dev/null; then remote_code=; fi
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-4}"  # GiB; only vLLM's CPU build reads it
exec "$python" vllm_entry.py serve ./model --config serve.yaml ${remote_code:+"$remote_code"} "$@"
"""

_CONTAINER = """\
# {title}
FROM {image}

# No root in the container: the server needs none.
RUN useradd --create-home --uid 10001 server
USER 10001
WORKDIR /bundle
COPY --chown=10001 . /bundle

ENV HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \\
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["./serve.sh", "--host", "0.0.0.0", "--port", "8000"]
"""

CONTAINERFILE = _CONTAINER.format(
    title="NVIDIA GPU: podman build -t MODEL . && podman run --rm --device nvidia.com/gpu=all -p 8000:8000 MODEL",
    image=f"vllm/vllm-openai:v{VLLM_VERSION}",
)
CONTAINERFILE_CPU = _CONTAINER.format(
    title="CPU: podman build -f Containerfile.cpu -t MODEL . && podman run --rm --shm-size=1g -p 8000:8000 MODEL",
    image=f"vllm/vllm-openai-cpu:v{VLLM_VERSION}",
)


def model_card(name: str, report: dict[str, Any] | None) -> str:
    """README.md in the hub's model card form, from PruneReport.to_dict() where there is one."""
    head = ["---", "library_name: transformers", "tags: [slimgpt, pruned]", "---", "", f"# {name}", ""]
    body = ["A model packaged for vLLM by SlimGPT.", ""]
    if report:
        before, after, text = report["parameters_before"], report["parameters_after"], report["calibration"]
        base = report["base_model"]
        base = PurePath(base).name if PurePath(base).is_absolute() else base  # no path of this machine
        body = [
            f"Pruned from `{base}` by SlimGPT (structured, layer by layer).",
            "",
            f"- decoder projections removed: {report['ratio']:.1%}; of the whole model: {report['model_ratio']:.1%}",
            f"- parameters: {before:,} before, {after:,} after",
            f"- calibrated on {text.get('name', 'unnamed text')}: {text.get('tokens', 0):,} tokens",
            "",
        ]
    serve = ["## Serve", "", "```sh", "./serve.sh  # needs vLLM; add vLLM options as you like", "```", ""]
    check = ["Every file's sha256 is in `MANIFEST.json`.", ""]
    return "\n".join(head + body + serve + check)
