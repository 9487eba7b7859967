"""Checksums: a file is read once, and a changed one again. Locks: one process at a time."""

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading

import pytest

from slimgpt import files
from slimgpt.files import file_sha256, locked, remember_sha256


@pytest.fixture
def reads(monkeypatch):
    """Counts how often a file is read for its checksum."""
    count = []
    real = hashlib.file_digest
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *args: count.append(1) or real(*args))
    return count


def written(path, data, age_s):
    path.write_bytes(data)
    then = path.stat().st_mtime_ns - int(age_s * 1e9)
    os.utime(path, ns=(then, then))
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_read_once_also_under_another_name(tmp_path, reads):
    sha256 = written(tmp_path / "a", b"one", age_s=60)
    os.link(tmp_path / "a", tmp_path / "b")
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b") == file_sha256(tmp_path / "a") == sha256
    assert len(reads) == 1
    (tmp_path / "c").write_bytes(b"one")  # a copy is another file
    assert file_sha256(tmp_path / "c") == sha256
    assert len(reads) == 2


def test_a_changed_file_is_read_again(tmp_path, reads):
    path = tmp_path / "a"
    one = written(path, b"one", age_s=60)
    assert file_sha256(path) == one
    two = written(path, b"two", age_s=30)  # of the same length
    assert file_sha256(path) == two
    six, when = written(tmp_path / "new", b"six", age_s=0), path.stat().st_mtime_ns
    os.utime(tmp_path / "new", ns=(when, when))
    (tmp_path / "new").replace(path)  # of the same time, too
    assert file_sha256(path) == six
    assert len(reads) == 3


def test_a_file_modified_just_now_is_read_again(tmp_path, reads):
    """A file system may keep times to 2 seconds: a second change would not show."""
    sha256 = written(tmp_path / "a", b"one", age_s=0)
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "a") == sha256
    assert len(reads) == 2


def test_a_file_written_by_this_process_is_not_read(tmp_path, reads):
    sha256 = written(tmp_path / "a", b"one", age_s=0)
    remember_sha256(tmp_path / "a", sha256)
    assert file_sha256(tmp_path / "a") == sha256
    assert reads == []


def test_only_one_process_holds_a_folder_and_no_lock_file_is_left(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with locked(folder):
        with pytest.raises(BlockingIOError, match=f"another process is writing to {folder}; wait for it or choose"):
            locked(folder).__enter__()
        assert list(tmp_path.rglob("*")) == [folder]
    with locked(folder):  # released
        pass


HOLD = "import pathlib, sys, time; from slimgpt.files import locked\nwith locked(pathlib.Path(sys.argv[1])): "


def holder(folder):
    """A process that holds the folder."""
    words = [sys.executable, "-c", HOLD + "print('held', flush=True); time.sleep(600)", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_the_lock_is_released_when_its_process_is_killed(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(BlockingIOError):
            locked(tmp_path).__enter__()
        process.kill()
        process.wait()
        with locked(tmp_path):
            pass


def test_a_waiting_thread_gets_the_lock_on_release(tmp_path):
    entered = []

    def enter():
        with locked(tmp_path, wait=True):
            entered.append(True)

    thread = threading.Thread(target=enter)
    with locked(tmp_path):
        thread.start()
        thread.join(0.3)
        assert not entered
    thread.join()
    assert entered


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)  # the kernel's answer on such a mount
    with pytest.raises(OSError, match=rf"{tmp_path} cannot be locked \(.*\): its file system does not support locks"):
        locked(tmp_path).__enter__()
