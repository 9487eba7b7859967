"""One background process of this machine, in a session of its own: start, wait until it answers, stop.

Prefect and MLflow do not replace this. ``prefect server start --background`` runs uvicorn itself, so the server stands
still as ``flows.prefect_server`` describes, and its output goes to a pipe that nobody reads. ``prefect server stop``
signals whatever process has the number in its pid file, after a reboot another program. ``prefect worker start`` and
``mlflow server`` have no background mode and no stop: they run here in the foreground, as children.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deploy.serving.server import check_port, log_tail
from slimgpt.files import json_bytes, write_atomically

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
MARK = "SLIMGPT_SERVICE"  # in the environment of a service and of all that it starts: which it is, and of which folder
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy for this machine's own servers


@dataclass(frozen=True)
class Service:
    """A process in a session of its own, remembered by pid and start time, since pids are used again.

    What it started is known by its environment alone, whatever became of the record.

    Args:
        name: also of its log and record.
        folder: for both.
        health: a URL that answers when it is ready; empty where being alive is all there is to ask.
        port: that it listens on; 0 where it does not.
        state: where it keeps its state, for people.
    """

    name: str
    folder: Path
    command: tuple[str, ...] = ()
    health: str = ""
    port: int = 0
    state: str = ""

    @property
    def log(self) -> Path:
        """Everything it prints."""
        return self.folder / f"{self.name}.log"

    @property
    def _record(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def _mark(self) -> str:
        return f"{self.name} of {self.folder.resolve()}"

    def _remembered(self) -> dict[str, Any]:
        """The record; empty where there is none, or none that can be read."""
        try:
            record = json.loads(self._record.read_bytes())
        except (OSError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}

    def pid(self) -> int:
        """Of the running process; 0 where it does not run."""
        match self._remembered():
            case {"pid": int(pid), "started": int() | float() as started}:
                with contextlib.suppress(psutil.Error, ValueError, OverflowError):
                    process = psutil.Process(pid)
                    if abs(process.create_time() - started) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                        return pid
        return 0

    def check(self) -> None:
        """Whether it can be started, or runs as it should.

        Raises:
            ValueError: when another program listens on its port, and would answer in its place; when it runs on
                another state than the environment asks for now.
        """
        if self.pid():
            kept = self._remembered().get("state", self.state)
            if kept != self.state:
                raise ValueError(f"{self.name} runs with its state in {kept}; `make down` before it uses {self.state}")
        elif self.port:
            try:
                check_port("127.0.0.1", self.port)
            except ValueError as error:
                why = str(error).partition(";")[0]
                raise ValueError(f"{self.name}: {why}; set {self.name.upper()}_PORT to another") from None

    def start(self, environment: dict[str, str]) -> None:
        """Start it, unless it runs."""
        if self.pid():
            return
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, MARK: self._mark},
                cwd=self.folder,
                start_new_session=True,
            )
        started = psutil.Process(process.pid).create_time()
        write_atomically(self._record, json_bytes({"pid": process.pid, "started": started, "state": self.state}))

    def wait(self) -> None:
        """Until it answers.

        Raises:
            OSError: when it ends or stays silent; the message ends with the last lines of its log.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.pid() and time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, OSError):
                if not self.health or _direct.open(self.health, timeout=5).status == 200:
                    return
            time.sleep(0.25)
        what = f"did not answer within {START_TIMEOUT_S:.0f} s" if self.pid() else "ended before it answered"
        raise OSError(f"{self.name} {what}; {log_tail(self.log)}")

    def stop(self) -> bool:
        """End it and all that it started: politely, then by force. Returns whether there was anything to end."""
        pid, seen = self.pid(), set(self._members())  # a worker that was killed leaves its flow runs behind
        found = bool(seen)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while pid and (members := self._members()) and time.monotonic() < deadline:
            seen.update(members)
            time.sleep(0.1)
        for member in self._members():
            seen.add(member)
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        while self._members() or any(map(_is_alive, seen)):  # one that is dying carries its mark no more
            time.sleep(0.05)
        self._record.unlink(missing_ok=True)
        return found

    def _members(self) -> list[int]:
        """Itself, and the processes that carry its mark."""
        leader = self.pid()
        return [pid for pid in psutil.pids() if pid == leader or _mark_of(pid) == self._mark]


def _is_alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _mark_of(pid: int) -> str:
    try:
        return psutil.Process(pid).environ().get(MARK, "")
    except (psutil.Error, OSError):  # it has ended, or belongs to another user
        return ""
