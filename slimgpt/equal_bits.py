"""What equal bits from run to run depend on: the order in which sums are added, and so device, threads and libraries.

MKL, with which torch multiplies and factorises matrices on a CPU, promises equal bits from one run to the next only in
its mode for that, with a number of threads that it does not change by itself; it reads both before its first product.
"""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MKL_SETTINGS = {"MKL_CBWR": "AUTO,STRICT", "MKL_DYNAMIC": "FALSE"}
_MODES = {1: "off", 0x10002: "AUTO,STRICT"}  # of mkl_types.h
_ALL = -1
# What torch computes with MKL's vector functions (aten/src/ATen/cpu/vml.h and UnaryOpsKernel.cpp).
_VECTOR_FUNCTIONS = (
    "acos asin atan cos cosh erf erfc erfinv exp expm1 lgamma log log10 log1p log2 sin sinh sqrt tan tanh trunc"
)


def request_equal_bits() -> None:
    """Ask MKL for equal bits, in this process and those it starts, unless the environment says how it is to compute.

    Too late where torch has multiplied matrices before: ``mkl_mode`` says what is in effect.
    """
    for name, value in MKL_SETTINGS.items():
        os.environ.setdefault(name, value)


def settle_vector_functions() -> None:
    """Let MKL choose the kernel of each vector function before several threads call it: to be called before computing.

    MKL up to 2024.2 chooses at a function's first call. Where two threads make that together, one of them may compute
    its share with a kernel of low accuracy: 1e-4 off in cos, in one of some ten processes (pytorch issue 188792). A
    model's rotary embedding is such a call. One number is computed by one thread.
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for name in _VECTOR_FUNCTIONS.split():
            getattr(torch, name)(one)


def without_request(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program that promises no equal bits: what was asked of MKL costs it a few percent."""
    return {name: value for name, value in environment.items() if MKL_SETTINGS.get(name) != value}


def mkl_mode() -> str:
    """How MKL computes in this process: ``off``, ``AUTO,STRICT`` or another mode; empty where torch has no MKL."""
    import torch

    if not torch.backends.mkl.is_available():
        return ""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        mode = int(library.mkl_serv_cbwr_get(_ALL))
    except (OSError, AttributeError):  # another system, or a torch that was built otherwise
        return "unknown"
    return _MODES.get(mode, f"{mode:#x}")


def conditions(device: Any) -> dict[str, Any]:
    """What equal bits need besides equal input, for what is computed on this ``torch.device``.

    Returns:
        The device's name, versions, a digest of our code; on a CPU also the threads, which share the sums out among
        them, and MKL's mode.
    """
    import torch
    import transformers

    from slimgpt.device import device_name
    from slimgpt.files import code_digest

    on_cpu = device.type == "cpu"
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if on_cpu else 0,
        "mkl": mkl_mode() if on_cpu else "",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "code": code_digest(),
    }
