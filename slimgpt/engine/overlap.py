"""Reading and writing beside the computation: the next layer comes, and the last one goes, while this one computes.

On a GPU alone. On a CPU both happen in place: there they would take memory, and cores from the work they wait for.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

T = TypeVar("T")


def overlaps(device: torch.device) -> bool:
    """Whether files are read and written beside the computation."""
    return device.type == "cuda"


def read_ahead(read: Callable[[int], T], layers: Iterable[int], device: torch.device) -> Generator[T, None, None]:
    """What ``read`` gives for each layer in order, each read while the one before it is at work.

    Raises:
        BaseException: what ``read`` raised, when it is that layer's turn.
    """
    if not overlaps(device):
        yield from map(read, layers)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        coming: Future[T] | None = None
        for layer in layers:
            here, coming = coming, reader.submit(read, layer)
            if here is not None:
                yield here.result()
        if coming is not None:
            yield coming.result()


class WriteBehind:
    """Calls made one after the other in a thread of their own, while the program goes on; no more than one waits.

    What a call raises is raised by the next one, or by ``wait``. The block ends when all calls have.
    """

    def __init__(self, device: torch.device):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write") if overlaps(device) else None
        self._waiting: Future[None] | None = None

    def __call__(self, write: Callable[[], None]) -> None:
        """Call ``write``, or begin to, once the call before it is over."""
        self.wait()
        if self._thread is None:
            write()
        else:
            self._waiting = self._thread.submit(torch.inference_mode()(write))  # a thread has a mode of its own

    def wait(self) -> None:
        """Until the last call is over."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except BaseException:
            if error is None:
                raise  # else the first error is the one to tell
        finally:
            if self._thread is not None:
                self._thread.shutdown()
