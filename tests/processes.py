"""Processes that tests start and kill: forked from a server that has imported torch and slimgpt once."""

import multiprocessing
import os
import sys
from pathlib import Path

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(
    [
        "slimgpt.engine.pruner",
        "flows.cli",
        "flows.cli.show",
        "tests.tiny_models",
        "tests.flows.killed_flow",
        "tests.tasks.registry.finished_run",
    ]
)


def start(function, *args):
    """A process that runs ``function(*args)``; both must be importable."""
    process = _forkserver.Process(target=function, args=args)
    process.start()
    return process


def queue():
    """A queue that such processes can be given."""
    return _forkserver.Queue()


def write_output_to(log: Path) -> None:
    """Write what this process prints to ``log``; without it, the server's own output takes it."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def signal_self_at_call(number, call):
    """From now on count this process's calls, and send it signal ``number`` at the ``call``-th. Answers the counter."""
    calls = [0]

    def count(frame, event, arg):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)

    sys.setprofile(count)
    return calls
