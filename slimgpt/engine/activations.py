"""Where the activations of the calibration set are kept between two layers: on the device, in host memory or in a file.

Residual stream and head outputs of all tokens are what grows with the calibration set. Away from the device, blocks
come and go while it computes: the next one is fetched, and the last one stored, beside the block at work. Copies are
exact, so the place changes no bit of the result.
"""

import mmap
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from slimgpt.usage import free_memory

Place = Literal["device", "host", "disk"]


def choose_place(setting: str, device: torch.device, need: int) -> Place:
    """Where activations go; on a CPU, device and host are the same.

    Args:
        setting: ``auto``, ``device``, ``host`` or ``disk``. ``auto`` is the device where it has room, else the host.
        device: where the run computes.
        need: bytes of device memory that the run needs with its activations on the device.
    """
    if setting == "disk":
        return "disk"
    if device.type != "cuda":
        return "device"
    if setting == "auto":
        return "device" if need <= free_memory(device) else "host"
    return "host" if setting == "host" else "device"


class Blocks:
    """Blocks of sequences on the device: ``blocks[b] = x`` keeps one, iteration gives them all, in order."""

    def __init__(self, count: int):
        self._blocks: list[Any] = [None] * count

    def __len__(self) -> int:
        return len(self._blocks)

    def __setitem__(self, b: int, x: Tensor) -> None:
        self._blocks[b] = x

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._blocks)


class HostBlocks(Blocks):
    """Blocks in pinned host memory, moved by a CUDA stream of their own."""

    def __init__(self, count: int, device: torch.device):
        super().__init__(count)
        self.device = device
        self.copies = torch.cuda.Stream(device)

    def __setitem__(self, b: int, x: Tensor) -> None:
        x = x.contiguous()
        slot = self._blocks[b]
        if slot is None or slot.shape != x.shape or slot.dtype != x.dtype:
            slot = self._blocks[b] = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            slot.copy_(x, non_blocking=True)
        x.record_stream(self.copies)  # its memory is not handed out again before the copy is done

    def __iter__(self) -> Iterator[Tensor]:
        # One stream carries all copies, so a block is read only after it was written.
        return prefetched(len(self), self._fetch, self._arrive, self.device)

    def _fetch(self, b: int) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self.copies):
            return self._blocks[b].to(self.device, non_blocking=True), self.copies.record_event()

    def _arrive(self, coming: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        x, arrived = coming
        here = torch.cuda.current_stream(self.device)
        here.wait_event(arrived)
        x.record_stream(here)
        return x


class DiskBlocks(Blocks):
    """Blocks in a memory-mapped file without a name: its space is free again when the process ends, however it ends.

    A thread moves them, in the order requested, and lets go of each page once it is copied, so that they do not count
    as memory of the process.

    Args:
        count: blocks.
        block_bytes: bytes of the largest.
        device: where the run computes.
        folder: on which disk.

    Raises:
        OSError: when the disk has no room for them.
    """

    def __init__(self, count: int, block_bytes: int, device: torch.device, folder: Path):
        super().__init__(count)
        self.device = device
        self._size = -(-block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), count * self._size, folder)
            self._map = mmap.mmap(file.fileno(), count * self._size)
        self._mover = ThreadPoolExecutor(1, thread_name_prefix="activations")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._writing: deque[Future[None]] = deque()

    def __setitem__(self, b: int, x: Tensor) -> None:
        assert x.nbytes <= self._size
        self._blocks[b] = x.shape, x.dtype
        done = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        self._writing.append(self._mover.submit(self._write, b, x, done))
        while len(self._writing) > 2:  # so that no more than these wait in memory
            self._writing.popleft().result()

    def __iter__(self) -> Iterator[Tensor]:
        return prefetched(len(self), lambda b: self._mover.submit(self._read, b), self._arrive, self.device)

    def _slot(self, b: int) -> Tensor:
        shape, dtype = self._blocks[b]
        count = prod(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=b * self._size).view(shape)

    def _write(self, b: int, x: Tensor, done: torch.cuda.Event | None) -> None:
        if done is not None:
            done.synchronize()
        with torch.no_grad(), torch.cuda.stream(self._copies):  # a thread has its own mode and stream
            self._slot(b).copy_(x)
            self._forget(b)

    def _read(self, b: int) -> Tensor:
        with torch.no_grad():  # no inference mode: the backward pass takes a gradient by what was read
            slot = self._slot(b)
            x = torch.empty(slot.shape, dtype=slot.dtype, pin_memory=self.device.type == "cuda").copy_(slot)
            self._forget(b)
            return x

    def _arrive(self, coming: Future[Tensor]) -> Tensor:
        return coming.result().to(self.device, non_blocking=True)

    def _forget(self, b: int) -> None:
        """Give the pages back to the system, which keeps them on disk and, while it has room, in its cache."""
        self._map.madvise(mmap.MADV_DONTNEED, b * self._size, self._size)


def prefetched(count: int, fetch: Any, arrive: Any, device: torch.device) -> Iterator[Tensor]:
    """Every block in order, each fetched while the one before it is at work."""
    begun: deque[torch.cuda.Event] = deque()
    coming = fetch(0)
    for b in range(count):
        here, coming = coming, fetch(b + 1) if b + 1 < count else None
        yield arrive(here)
        del here
        if device.type == "cuda":  # at most two blocks of work wait on the device, or their memory would pile up
            begun.append(torch.cuda.current_stream(device).record_event())
            if len(begun) > 1:
                begun.popleft().synchronize()


def make_blocks(place: Place, count: int, block_bytes: int, device: torch.device, folder: Path) -> Blocks:
    """Room for ``count`` blocks of at most ``block_bytes`` in ``place``; ``folder`` is where a file would go.

    Raises:
        OSError: when the disk has no room for them.
    """
    if place == "disk":
        return DiskBlocks(count, block_bytes, device, folder)
    return HostBlocks(count, device) if place == "host" else Blocks(count)


def _reserve(handle: int, size: int, folder: Path) -> None:
    """Take the file's space now: writing to a mapped file on a full disk would kill the process."""
    try:
        if sys.platform == "darwin":
            os.ftruncate(handle, size)  # it has no posix_fallocate
        else:
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise OSError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free; activations on disk need {size / 1e9:.2f} GB there "
            f"({error.strerror}); free some, ask for fewer samples, or keep them elsewhere (--activations host)"
        ) from None
