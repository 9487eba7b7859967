"""Several processes, a device each: the calibration sequences are shared out, H is summed, the first rank decides.

    torchrun --nproc-per-node=2 -m slimgpt prune MODEL OUT --ratio 0.25

torch.distributed carries everything: NCCL between GPUs, gloo between CPUs. A rank waits for the others only where all
of them meet, and there a rank that failed says so: all end with its error instead of waiting for it.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes of this run: those of torch.distributed's default group, or this one alone.

    Attributes:
        index: of this process; the first one, 0, decides and writes.
        count: of processes.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.index = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this process decides and writes."""
        return self.index == 0

    def share(self, ids_NT: Tensor) -> Tensor:
        """This rank's sequences; shares differ by one at most."""
        return ids_NT.tensor_split(self.count)[self.index]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that each rank does by itself; at its end all meet, and fail together if one failed.

        Raises:
            BaseException: on every rank, what the first failing rank raised.
            ConnectionError: when a rank is gone.
        """
        failed: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failed = error
            if self.count == 1:
                raise
        others = self.gather(None if failed is None else _portable(failed))
        if failed is not None:
            raise failed
        for other in others:
            if other is not None:
                raise other

    def from_first(self, decide: Callable[[], T]) -> T:
        """What ``decide`` returns on the first rank; it is called there only.

        Raises:
            BaseException: on every rank, what it raised.
            ConnectionError: when a rank is gone.
        """
        if self.count == 1:
            return decide()
        sent: list[Any] = [None, None]
        failed: BaseException | None = None
        if self.first:
            try:
                sent[0] = decide()
            except BaseException as error:
                failed = error
                sent[1] = _portable(error)
        self._meet(dist.broadcast_object_list, sent, src=0)
        if failed is not None or sent[1] is not None:
            raise failed or sent[1]
        result: T = sent[0]
        return result

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, on every rank.

        Raises:
            ConnectionError: when a rank is gone.
        """
        values = [value] * self.count
        if self.count > 1:
            self._meet(dist.all_gather_object, values, value)
        return values

    def add(self, x: Tensor) -> None:
        """Replace ``x`` by its sum over the ranks.

        Raises:
            ConnectionError: when a rank is gone.
        """
        if self.count > 1:
            self._meet(dist.all_reduce, x)

    def copy(self, x: Tensor) -> None:
        """Replace ``x`` by the first rank's.

        Raises:
            ConnectionError: when a rank is gone.
        """
        if self.count > 1:
            self._meet(dist.broadcast, x.view(torch.uint8), src=0)  # as bytes: not every backend knows every dtype

    def _meet(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, **kwargs)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0].rpartition("] ")[2].split(". ")[0]
            raise ConnectionError(
                f"rank {self.index} of {self.count} lost the others ({reason}); finished layers are kept: "
                "run the same command again to resume"
            ) from error


def _portable(error: BaseException) -> BaseException:
    """The error as it can be sent to another process."""
    try:
        same = pickle.loads(pickle.dumps(error))  # noqa: S301  made here
        assert isinstance(same, BaseException)
        return same
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, each with a device of its own; alone where torchrun did not start this.

    Args:
        device: as in PruneConfig.

    Raises:
        ValueError: when the device is one for all, or there are fewer GPUs than processes.
    """
    if not launched() or dist.is_initialized():
        yield Ranks()
        return
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        _take_gpu(device, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    yield Ranks()
    dist.destroy_process_group()  # not after an error: it would wait for a rank that is gone, and the process ends


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def _take_gpu(device: str, local_rank: int, processes: int) -> None:
    if device not in ("auto", "cuda"):
        raise ValueError(
            f"device is {device!r} for all {processes} processes; leave it at auto: each takes its own GPU"
        )
    if processes > torch.cuda.device_count():
        raise ValueError(
            f"torchrun started {processes} processes here, and there are {torch.cuda.device_count()} GPUs; "
            "start one process per GPU (--nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
