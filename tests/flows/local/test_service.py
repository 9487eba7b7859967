"""One background process: what it started ends with it, and what it did not start is never touched."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from flows.local import service as services
from flows.local.service import Service

SLEEPER = "import time; time.sleep(600)"
# starts a child that outlives it
PARENT = (
    f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]).pid, flush=True); {SLEEPER}"
)


@pytest.fixture
def service(tmp_path):
    service = Service("parent", tmp_path, (sys.executable, "-c", PARENT))
    yield service
    service.stop()


def child_of(service):
    while not service.log.read_text().strip():
        time.sleep(0.02)
    return int(service.log.read_text())


@pytest.mark.parametrize("killed", [False, True])
def test_what_it_started_ends_with_it(service, killed, monkeypatch):
    monkeypatch.setattr(services, "STOP_TIMEOUT_S", 1)  # nobody asks the child to end before
    service.start(dict(os.environ))
    pid, child = service.pid(), child_of(service)
    if killed:
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)])
    assert service.stop()
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert not service.stop()


@pytest.mark.parametrize(
    "record", [None, "", '{"pid": ', "[]", '{"pid": "seven"}', '{"pid": -1, "started": 0}', "\udcff"]
)
def test_a_lost_or_damaged_record_hides_nothing_that_runs(service, tmp_path, record):
    service.start(dict(os.environ))
    child, file = child_of(service), tmp_path / "parent.json"
    if record is None:
        file.unlink()
    else:
        file.write_bytes(record.encode(errors="surrogateescape"))
    assert service.pid() == 0
    assert service.stop()
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("alive", [True, False])
def test_a_process_that_got_the_same_numbers_is_left_alone(service, tmp_path, alive):
    """As after a reboot: another program leads the session of that number, or led it and left a child."""
    command = [sys.executable, "-c", PARENT]
    foreign = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    child = int(foreign.stdout.readline())
    try:
        if not alive:
            foreign.kill()
            foreign.wait()
        record = {"pid": foreign.pid, "started": time.time() - 86_400, "state": ""}
        (tmp_path / "parent.json").write_text(json.dumps(record))
        assert service.pid() == 0
        assert not service.stop()
        assert psutil.pid_exists(child)
        assert foreign.poll() is None or not alive
        assert not (tmp_path / "parent.json").exists()
    finally:
        os.killpg(foreign.pid, signal.SIGKILL)
