"""What a run takes: seconds by phase and peak memory."""

import ctypes
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by phase. On a GPU they are the device's own, taken between events: nothing waits for a timing."""

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Bill what happens inside to ``phase``."""
        if self.device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._open.append((phase, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far; on a GPU it waits for the work that was begun."""
        for phase, begin, end in self._open:
            end.synchronize()
            self._seconds[phase] += begin.elapsed_time(end) / 1000
        self._open.clear()
        return dict(self._seconds)


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the highest allocated device memory, else the highest resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process can still take, those included that torch holds for later."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def return_freed_memory() -> None:
    """Give the system back what was freed; glibc keeps what was freed in small pieces, a layer's worth and more."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
