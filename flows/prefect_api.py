"""Prefect's API for a command: the server that is configured, known in seconds to answer, or one that ends with us.

Prefect starts a server of its own where none is configured, and ends it as it exits. Killed, it would leave that server
behind; the one started here is then killed by the kernel (Linux).
"""

import atexit
import contextlib
import logging
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import httpx
from prefect.client.orchestration import get_client
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    Settings,
    get_current_settings,
    temporary_settings,
)

from deploy.engines import vllm_entry
from slimgpt.files import check_writable, locked
from tasks.messages import reason, without_password

ANSWER_WITHIN_S = 10.0
_DATABASE = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")


@contextlib.contextmanager
def reached() -> Iterator[None]:
    """Around a flow that a command runs.

    Raises:
        ConnectionError: one line with the remedy: the server that is configured does not answer within seconds, or
            stops answering while the flow runs; the temporary one does not start.
        PermissionError: the server wants a login.
        OSError: the folder of its database cannot be written to, or the database is damaged.
    """
    url = PREFECT_API_URL.value() or ""
    _check_proxy()
    if url:
        check(url)
    elif PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
        settings = get_current_settings()
        alone: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if not _names_database(settings):
            check_writable(_folder(settings))  # else the server would be waited for in vain
            _folder(settings).mkdir(parents=True, exist_ok=True)
            _check_database(_database(settings))
            alone = locked(_folder(settings), wait=True)  # two servers would make the same tables
        server = OwnServer()
        try:  # here and not in a thread that ends before the flow does: the kernel watches that thread
            with alone:
                server.start()
        except RuntimeError as error:
            server.stop()  # a slow one would write on, below the last line
            raise ConnectionError(
                f"Prefect's temporary server did not start ({error}); what it said stands above. A server of your own "
                "can take its place: make up, and PREFECT_API_URL as it says"
            ) from None
    for logger in (logging.getLogger(), logging.getLogger("prefect")):
        for console in logger.handlers:
            console.addFilter(_in_one_line)
    try:
        yield
    except httpx.TransportError as error:
        if not url or error.request.url.host != httpx.URL(url).host:
            raise
        raise ConnectionError(
            f"Prefect at {without_password(url)} stopped answering ({reason(error, url)}); finished work is kept: "
            "run the same command again when it is back"
        ) from None


def _in_one_line(record: logging.LogRecord) -> bool:
    """The console says what failed without Prefect's traceback; its UI, whose handler comes first, has it whole."""
    if record.name.startswith("prefect") and not os.environ.get("SLIMGPT_TRACEBACK"):
        record.exc_info = record.exc_text = None
    return True


def _check_proxy() -> None:
    """Refuse a proxy that Prefect's client cannot use, which would else end in a traceback, whatever is excluded.

    Raises:
        ValueError: naming the variable and the remedy.
    """
    for scheme, proxy in getproxies().items():
        if proxy.startswith("socks") and find_spec("socksio") is None:
            raise ValueError(
                f"the proxy for {scheme!r} is {without_password(proxy)} ({scheme}_proxy), which Prefect's client uses "
                "only with the package socksio: pip install socksio, or unset the variable for this command"
            )


def check(url: str) -> None:
    """Check that the server that is configured answers, and not only that it is there.

    Raises:
        ConnectionError: one line with the remedy.
        PermissionError: when it wants a login; the message names the variables for it.
    """
    # Prefect's own patience is a minute and more, which suits a flow that runs.
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        client = get_client(httpx_settings={"timeout": ANSWER_WITHIN_S}, sync_client=True)
        problem = client.api_healthcheck()
        if problem is None:  # which asks for no login
            try:
                client.api_version()
            except httpx.HTTPStatusError as error:
                if error.response.status_code in (401, 403):
                    raise PermissionError(
                        f"Prefect at {without_password(url)} refuses to answer ({error.response.status_code}): set "
                        "PREFECT_API_AUTH_STRING to the user:password that it expects, or PREFECT_API_KEY for "
                        "Prefect Cloud"
                    ) from None
            except httpx.TransportError as error:
                problem = error
    if problem is not None:
        if not httpx.URL(url).path.rstrip("/").endswith("/api"):
            raise ConnectionError(
                f"PREFECT_API_URL is {without_password(url)}, whose path does not end in /api: "
                f"set it to {without_password(url).rstrip('/')}/api"
            )
        raise ConnectionError(
            f"Prefect at {without_password(url)} does not answer ({reason(problem, url)}); start it, correct "
            "PREFECT_API_URL, or unset it (prefect config unset PREFECT_API_URL), as no server is needed"
        )


def _names_database(settings: Settings) -> bool:
    return bool(settings.to_environment_variables(exclude_unset=True).keys() & set(_DATABASE))


def _folder(settings: Settings) -> Path:
    """Of the temporary server's database and of what it remembers of results: in the folder of the runs."""
    return settings.server.memo_store_path.parent


def _database(settings: Settings) -> Path:
    return _folder(settings) / "temporary-server.db"


def _check_database(file: Path) -> None:
    """Refuse a damaged database, on which the server would end with pages of text that do not name it.

    Raises:
        OSError: with the file, what SQLite says of it, and the remedy.
    """
    if not file.is_file():
        return
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            (said,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError:  # another process holds it at this moment
        return
    except sqlite3.DatabaseError as error:
        said = str(error)
    if said != "ok":
        raise OSError(
            f"the database of Prefect's temporary server, {file}, is damaged ({said}): remove it; it lists earlier "
            "flow runs, and finished work is kept elsewhere"
        )


class OwnServer(SubprocessASGIServer):
    """Prefect's temporary server, which the kernel kills when this process is killed. Prefect finds it as its own."""

    def start(self, timeout: int | None = None) -> None:
        """Start it, unless it runs, and wait until it answers: unlike Prefect's own start, for no process that ended.

        Raises:
            RuntimeError: when it ends, or stays silent.
        """
        if self.running:
            return
        self._begin()
        atexit.register(self.stop)
        limit = timeout or PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            assert self.server_process is not None, "it was begun"
            assert self.port is not None, "it was chosen"
            if (code := self.server_process.poll()) is not None:
                if self.is_port_available(self.port):
                    raise RuntimeError(f"it ended with exit code {code}")
                self._begin()  # another program was quicker to take the port
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.api_url}/health", trust_env=False).status_code == 200:
                    self.running = True
                    return
            time.sleep(0.1)
        raise RuntimeError(f"Timed out after {limit} s")

    def _begin(self) -> None:
        self.port = self.find_available_port()
        self.server_process = self._run_uvicorn_command()

    def _run_uvicorn_command(self) -> "subprocess.Popen[Any]":
        ours = {
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
            vllm_entry.PARENT_PID: str(os.getpid()),
        }
        current = get_current_settings()
        with contextlib.suppress(OSError):  # with a database elsewhere the flow says so in one line
            _folder(current).mkdir(parents=True, exist_ok=True)
        settings = current.to_environment_variables(exclude_unset=True)
        if not _names_database(current):
            # Not in the home folder, which a container's user may not write to and another Prefect may have used.
            ours[_DATABASE[0]] = f"sqlite+aiosqlite:///{_database(current)}"
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.prefect_server", "temporary", str(self.port)],
            env={**os.environ, **ours, **settings},
        )
