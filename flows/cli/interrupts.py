"""Ctrl-C and SIGTERM while a model is pruned or trained: one line that says what is kept, and the usual exit code."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal that ended the run: what to tell the user, and the exit code (130 for Ctrl-C, 143 for SIGTERM)."""

    @property
    def code(self) -> int:
        """128 and the signal's number."""
        return 128 + int(self.args[1])


class Interrupts:
    """Counts what is finished, layers or steps, and stops the run where it may.

    Attributes:
        unit: what is counted.
        kept: what is left of the run, for the message.
        alone: a process alone stops at once. One of several stops at the end of a unit, where all meet: elsewhere the
            others would wait for it.
    """

    def __init__(self) -> None:
        self.alone, self.unit = True, "layer"
        self.kept = "finished layers are kept: run the same command again to resume"
        self.done = self.units = 0
        self._pending: int | None = None
        self.stopped: Stopped | None = None

    def unit_done(self, done: int, units: int) -> None:
        """Unit ``done``, counted from 1, is finished.

        Raises:
            Stopped: when a signal came.
        """
        self.done, self.units = done, units
        if self._pending is not None:
            self._stop()

    def signalled(self, number: int) -> None:
        """A signal came.

        Raises:
            Stopped: in a process that is alone.
        """
        self._pending = number
        if self.alone:
            self._stop()

    def _stop(self) -> None:
        unit, next_one = self.unit, min(self.done + 1, self.units)
        at = f"at {unit} {next_one} of {self.units}" if self.done else f"before the first {unit}"
        self.stopped = Stopped(f"interrupted {at}; {self.kept}", self._pending)
        raise self.stopped


@contextmanager
def listening() -> Iterator[Interrupts]:
    """Turn SIGINT and SIGTERM into ``Stopped``; a second one does what it does without this."""
    interrupts = Interrupts()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, _: Any) -> None:
        signal.signal(number, before[number])
        interrupts.signalled(number)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield interrupts
    except Exception:
        if interrupts.stopped:  # it met a library halfway, which then failed on its way out
            raise interrupts.stopped from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
