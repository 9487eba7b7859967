"""Checksums: a file is read once, and a changed one again."""

import hashlib
import os

import pytest

from slimgpt import files
from slimgpt.files import file_sha256, remember_sha256


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


def test_what_was_modified_just_now_is_read_again(tmp_path, reads):
    """A file system may keep times to 2 seconds: a second change would not show."""
    sha256 = written(tmp_path / "a", b"one", age_s=0)
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "a") == sha256
    assert len(reads) == 2


def test_what_this_process_wrote_is_not_read(tmp_path, reads):
    sha256 = written(tmp_path / "a", b"one", age_s=0)
    remember_sha256(tmp_path / "a", sha256)
    assert file_sha256(tmp_path / "a") == sha256
    assert reads == []
