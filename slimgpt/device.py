"""The device that a setting means here, and its name in reports."""

import platform
from typing import Literal, cast

import torch

Dtype = Literal["float32", "bfloat16", "float16"]  # what models are computed in


def resolve_device(name: str) -> torch.device:
    """The device that ``cpu``, ``cuda``, ``cuda:1`` or ``auto`` means here; auto takes a GPU where there is one.

    Raises:
        ValueError: when this machine lacks it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("this package computes on CPUs and on GPUs of CUDA or ROCm")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not usable here ({reason}); use cpu, cuda or auto") from None
    return device


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported())


def compute_dtype(setting: str, device: torch.device, stored: torch.dtype | None) -> torch.dtype:
    """The dtype that a setting means here: the one that it names, or for ``auto`` what ``DTYPE_WORDS`` says.

    Args:
        setting: ``auto`` or a dtype's name.
        device: that computes.
        stored: the checkpoint's; None where it names none, which counts as float32.
    """
    if setting != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[setting]
    stored = stored or torch.float32
    if device.type != "cpu":
        return stored
    return torch.bfloat16 if stored.itemsize == 2 and has_fast_bfloat16(device) else torch.float32


def dtype_name(dtype: torch.dtype) -> Dtype:
    """As settings and records have it: ``bfloat16``."""
    return cast(Dtype, str(dtype).removeprefix("torch."))
