"""Files that are whole or absent, and their checksums."""

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write under a temporary name, flush to disk, rename: a reader, or a crash, finds the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
        commit(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def commit(temporary: Path, path: Path) -> None:
    """Flush a finished temporary file to disk and give it its name."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name itself
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
