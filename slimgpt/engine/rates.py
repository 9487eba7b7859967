"""How fast this device is, and the seconds that a cost takes at these rates."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from slimgpt.engine.cost import Cost, gram_operations
from slimgpt.method.obs import SOLVE_DTYPE, Gram

# Shares of the rate of one large product that a decoder layer and a solve reach: norms, softmax and elementwise work
# are not counted, and factorisations are no products. From SmolLM2 on a CPU, and a 7B shape on an H200
# (benchmarks/RESULTS.md).
CPU_SHARES = (0.65, 0.55)
GPU_SHARES = (0.45, 0.28)


@dataclass(frozen=True)
class Rates:
    """What a device reaches: operations per second by kind, bytes per second by way."""

    forward: float
    gram: float
    solve: float
    moved: float
    reduced: float
    read: float
    written: float

    def seconds(self, cost: Cost) -> dict[str, float]:
        """Seconds by phase. Copies of activations run beside the forward pass.

        On a GPU layers are read and written beside all of it, once the model's checksum is known.
        """
        of_forward, of_solve = GPU_SHARES if cost.device else CPU_SHARES
        forward = max(cost.forward / (of_forward * self.forward), cost.moved / self.moved)
        gram = cost.gram / self.gram + cost.reduced / self.reduced
        select = cost.solve / (of_solve * self.solve)
        read, write = cost.read / self.read, cost.written / self.written
        if cost.device:
            read, write = read / 2, max(0.0, read / 2 + write - forward - gram - select)
        return {"forward": forward, "gram": gram, "select": select, "read": read, "write": write}


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of this device, from products large enough to be representative: a fraction of a second.

    Copies and disks are not measured: 1 GB/s of disk; on a GPU 40 GB/s to and from the host, and the checksum of a
    model's files, some at a time, at 2 GB/s.
    """
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    x = torch.randn(size, size, device=device, dtype=dtype)
    gram = Gram(size, device)
    H = torch.eye(size, device=device, dtype=SOLVE_DTYPE)
    return Rates(
        forward=2 * size**3 / _seconds(lambda: x @ x, device),
        gram=size * gram_operations(size) / _seconds(lambda: gram.add(x), device),
        solve=2 * size**3 / _seconds(lambda: H @ H, device),
        moved=40e9 if gpu else 10e9,
        reduced=10e9,
        read=2e9 if gpu else 1e9,
        written=1e9,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
