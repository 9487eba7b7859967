"""Which process writes an MLflow run, and whether that process has ended."""

import hashlib
import os
import platform
from pathlib import Path

import psutil


def this_process() -> str:
    """This process as a run's tag holds it: machine, pid and start time. The machine is a digest: no names leave it."""
    return f"{this_machine()} {os.getpid()} {_started(psutil.Process())}"


def this_machine() -> str:
    """A digest that is this machine's own, and within a container that container's own."""
    identity = [platform.node(), _read("/etc/machine-id")]
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:  # not Linux
        namespace = ""
    if namespace != "pid:[4026531836]":  # not the first one of a Linux machine, whose number never differs
        identity += [namespace, _read("/proc/sys/kernel/random/boot_id")]
    return hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]


def has_ended(process: str) -> bool:
    """Whether a process, as ``this_process`` returned it there, is known to have ended. False where nobody can say."""
    machine, pid, started = process.split(" ")
    if machine != this_machine():
        return False
    try:
        candidate = psutil.Process(int(pid))
        return _started(candidate) != started or candidate.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):
        return not psutil.pid_exists(int(pid))


def _started(process: psutil.Process) -> str:
    """When the process was started; on Linux in ticks since the boot, which setting the clock does not change."""
    if stat := _read(f"/proc/{process.pid}/stat"):
        return stat.rpartition(")")[2].split()[19]
    return f"{process.create_time():.0f}"


def _read(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError:
        return ""
