"""Processes that tests start and kill: forked from a server that has imported torch and slimgpt once."""

import multiprocessing
import os
import sys

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(
    ["slimgpt.engine.pruner", "flows.cli", "flows.cli.show", "tests.tiny_models", "tests.flows.killed_flow"]
)


def start(function, *args):
    """A process that runs ``function(*args)``; both must be importable."""
    process = _forkserver.Process(target=function, args=args)
    process.start()
    return process


def queue():
    """A queue that such processes can be given."""
    return _forkserver.Queue()


def signal_self_at_call(number, call):
    """From now on count this process's calls, and send it signal ``number`` at the ``call``-th. Answers the counter."""
    calls = [0]

    def count(frame, event, arg):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)

    sys.setprofile(count)
    return calls
