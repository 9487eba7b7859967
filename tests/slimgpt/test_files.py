"""Checksums: a file is read once, and a changed one again. Locks: one process at a time."""

import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimgpt import files
from slimgpt.checkpoints.shards import write_shard
from slimgpt.files import file_sha256, free_bytes, locked, portable, remember_sha256, share
from tests.no_root import run_bound


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


def test_room_is_asked_of_the_disk_below_and_what_stands_in_the_way_is_named(tmp_path):
    assert free_bytes(tmp_path / "not" / "there") > 0
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").symlink_to(tmp_path)
    assert free_bytes(tmp_path / "folder" / "out") > 0
    for out, what in ("file", "file is a file"), ("link", "link is a link to .*gone, which is not there"):
        for place in (tmp_path / out, tmp_path / out / "below"):
            with pytest.raises(FileExistsError, match=f"{what}; OUT must be a folder"):
                free_bytes(place)


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


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_weights_and_converted_models_have_the_permissions_of_the_umask(tmp_path, umask, file, folder):
    """safetensors and mkdtemp make theirs for their owner alone: a service's user could not read the model."""
    before = os.umask(umask)
    try:
        write_shard(tmp_path / "model.safetensors", {"a": torch.zeros(2)})
        made = Path(tempfile.mkdtemp(dir=tmp_path))
        save_file({"a": torch.zeros(2)}, made / "model.safetensors")
        share(made)
    finally:
        os.umask(before)
    for path, mode in ((tmp_path / "model.safetensors", file), (made, folder), (made / "model.safetensors", file)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert [path.name for path in made.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "elsewhere"),
    [("/data/notes.txt", "notes.txt"), ("c4,/data/notes.txt:0.2", "c4,notes.txt:0.2"), ("org/model", "org/model")],
)
def test_what_is_written_for_others_names_no_folder_of_this_machine(text, elsewhere):
    assert portable(text) == elsewhere


def test_a_file_that_may_only_be_read_is_linked_where_one_is_no_root(tmp_path):
    """As tools leave it that keep large files under version control."""
    source, path = tmp_path / "source", tmp_path / "path"
    written(source, b"one", age_s=60)
    source.chmod(0o444)
    done = run_bound("from slimgpt.files import link; print(link(*map(Path, sys.argv[1:])))", source, path)
    assert (done.stdout.strip(), path.read_bytes()) == ("True", b"one"), done.stderr
