"""Serve in the foreground, as ``slimgpt serve`` does: vLLM's own lines, when it is ready, an end that leaves nothing.

This process only waits. vLLM runs in a session of its own, so that Ctrl-C reaches this process alone, which ends that
session as a whole; and if this process is killed, the kernel kills vLLM's.
"""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deploy.serving.health import healthy, url_of
from deploy.serving.server import (
    PROGRESS_EVERY_S,
    ServeConfig,
    ServerError,
    check_port,
    child_environment,
    serve_command,
    session_members,
    stop_session,
)

logger = logging.getLogger(__name__)


class _Signals:
    """The signals that end a server, in the order they came."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.came = threading.Event()
        self.leader = 0

    def note(self, number: int, _: object = None) -> None:
        """Remember a signal; the second one does not wait for vLLM to end politely."""
        self.received.append(number)
        self.came.set()
        if len(self.received) > 1 and self.leader:
            for pid in session_members(self.leader):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _noting_signals() -> Iterator[_Signals]:
    signals, before = _Signals(), {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and so do we then
            before[number] = handler
            signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve_in_foreground(
    model: Path, config: ServeConfig, *, served_name: str, on_ready: Callable[[str, float], None]
) -> int:
    """Serve ``model`` until a signal comes (SIGINT, SIGTERM, SIGHUP) or vLLM ends by itself.

    Args:
        model: folder of a checkpoint that ``check_servable`` lets pass.
        config: how to serve it.
        served_name: the model's name in requests.
        on_ready: called once, with the server's URL and the seconds it took to answer.

    Returns:
        The exit code: 128 and the signal's number, or 0 where vLLM ended in peace.

    Raises:
        ValueError: the port is in use.
        ServerError: vLLM ended by itself; what it printed says why.
    """
    port = check_port(config.host, config.port)
    command = serve_command(model.absolute(), config, port=port, served_name=served_name)
    with _noting_signals() as signals:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=child_environment(config), start_new_session=True
        )
        signals.leader = process.pid
        try:
            _watch(process, signals, url_of(config.host, port), served_name, on_ready)
        finally:
            stop_session(process)
    if signals.received:
        return 128 + signals.received[0]
    if process.returncode:
        raise ServerError(f"vLLM ended with code {process.returncode}; the lines above say why")
    return 0


def _watch(
    process: subprocess.Popen[bytes], signals: _Signals, url: str, name: str, on_ready: Callable[[str, float], None]
) -> None:
    """Return when a signal has come or vLLM has ended."""
    started = time.monotonic()
    next_progress, ready = PROGRESS_EVERY_S, False
    while process.poll() is None and not signals.came.wait(1 if ready else 0.25):
        waited = time.monotonic() - started
        if ready:
            continue
        if healthy(url) and process.poll() is None:  # another program's answer must not count for a dead server
            ready = True
            on_ready(url, waited)
        elif waited > next_progress:
            logger.info("waiting for %s, %.0f s", name, waited)
            next_progress += PROGRESS_EVERY_S
