"""Files that are complete or absent, and their checksums."""

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout, lock_descriptor
from safetensors import SafetensorError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TORCH_SAVE = ("inline_container", "iostream error")  # what torch.save says where a file could not be written
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_SETTLED_NS = 3_000_000_000
_OPENS_FOLDERS = hasattr(os, "O_DIRECTORY")  # not so on Windows
_known_sha256: dict[tuple[int, int, int, int], str] = {}


def portable(text: str) -> str:
    """The text as it says something elsewhere: of an absolute path the last part, also of several with commas."""
    return ",".join(PurePath(part).name if PurePath(part).is_absolute() else part for part in text.split(","))


def expanded(name: str | Path) -> Path:
    """Write out ``~`` in what a user named; of a user whom this machine does not know it stays."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def exists(path: str | Path) -> bool:
    """Whether a file or folder of this name exists: none whose name no disk could hold, for which Path raises."""
    try:
        return Path(path).exists()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


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
    with temporary.open("rb" if _OPENS_FOLDERS else "rb+") as file:  # a link to a file that may only be read is one
        os.fsync(file.fileno())
    temporary.replace(path)
    if not _OPENS_FOLDERS:
        return
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name itself
    finally:
        os.close(handle)


def link(source: Path, path: Path) -> bool:
    """Give a file a second name, in place of what has that name; False where the file system has no hard links."""
    temporary = path.with_name(path.name + ".tmp")
    for taken in (temporary, path):  # POSIX renames no name of a file onto another name of it
        taken.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), temporary)
    except OSError:  # another file system, or one without hard links
        return False
    commit(temporary, path)
    return True


def json_bytes(data: Any) -> bytes:
    """JSON as files hold it: indented, keys in order, so that equal data gives equal bytes."""
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that holds a folder, or will hold it.

    Raises:
        FileExistsError: where a file stands in its way, or a link to nothing.
    """
    there = _nearest(folder)
    if not there.is_dir():
        what = "a file" if there.exists() else f"a link to {there.readlink()}, which is not there"
        raise FileExistsError(f"{there} is {what}; OUT must be a folder")
    return shutil.disk_usage(there).free


def check_writable(folder: Path) -> None:
    """Try to write to a folder, or to the one that it would be made in; nothing is left there.

    Raises:
        OSError: of the kind that came, such as PermissionError, naming both folders and the remedy.
    """
    there = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise type(error)(
            f"{folder} cannot be written to ({error.strerror}); choose another folder, or change the permissions of "
            f"{there}"
        ) from None


def _nearest(folder: Path) -> Path:
    """What is there of a folder: itself, or the first thing above it."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))


def share(folder: Path) -> None:
    """Give a folder, and all in it, the permissions that the umask gives to what is made in the usual way.

    ``mkdtemp`` and safetensors make theirs for their owner alone, which keeps a service's user away from a model.
    """
    probe = Path(tempfile.mkdtemp(dir=folder)) / "probe"
    probe.mkdir()
    usual = stat.S_IMODE(probe.stat().st_mode)
    shutil.rmtree(probe.parent)
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode | usual if path.is_dir() else mode | (usual & 0o666))


@contextmanager
def writing(what: str, folder: Path, kept: str = "") -> Iterator[None]:
    """Say in one line what could not be written to ``folder``, and how to go on.

    Args:
        what: is being written.
        folder: where to; it need not be there yet.
        kept: what the next run finds.

    Raises:
        OSError: naming the folder, what it lacked room for, and the remedy; another failure as it is.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_ROOM:
            raise
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_SAVE):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        raise OSError(
            f"{what} could not be written to {folder}: {reason} ({shutil.disk_usage(there).free / 1e6:.1f} MB free); "
            f"make room there and run the same command again{f': {kept}' if kept else ''}"
        ) from error


TEMPORARY = "TMPDIR can name another folder"


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A temporary folder, gone with the block.

    Raises:
        OSError: where it has no room; the message names it and TMPDIR.
    """
    place = Path(tempfile.gettempdir())
    with (
        writing("temporary files", place, TEMPORARY),
        # Windows cannot remove files that are still mapped.
        tempfile.TemporaryDirectory(dir=place, prefix=prefix, ignore_cleanup_errors=True) as folder,
    ):
        yield Path(folder)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the folder for this process; the system releases the lock when the process ends, however it ends.

    The lock is on the folder itself, so that no lock file ends up in a checkpoint, a bundle or an upload. On Windows,
    where a folder cannot be opened, it is on a file beside it. On NFS, Linux keeps a folder's lock among the processes
    of one machine.

    Args:
        folder: must exist.
        wait: until another process releases it, instead of raising.

    Raises:
        BlockingIOError: when another process holds it.
        OSError: when its file system does not support locks.
    """
    with ExitStack() as held:
        try:
            if _OPENS_FOLDERS:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                held.callback(os.close, handle)
                free = lock_descriptor(handle, blocking=wait)
            else:
                beside = folder.with_name(f".{folder.name}.lock")
                held.enter_context(FileLock(beside, blocking=wait, fallback_to_soft=False))
                free = True
        except Timeout:
            free = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise OSError(
                f"{folder} cannot be locked ({error.strerror}): its file system does not support locks; choose a "
                "folder on another one, or mount it with locks"
            ) from None
        if not free:
            raise BlockingIOError(f"another process is writing to {folder}; wait for it or choose another OUT")
        yield


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """Make a folder beside ``folder``, gone after the block unless it was renamed to ``folder``.

    What a killed process left of the same folder goes first; what another one is writing stays, by its lock.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{glob.escape(f'.{folder.name}.partial-')}*"):
        with suppress(OSError), locked(left):
            shutil.rmtree(left)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.partial-"))
    with locked(partial):
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes; of a file that has not changed since this process hashed it, from memory.

    Unchanged means the same file (device and inode, so a hard link counts), size and time of modification. File
    systems keep that time to 2 seconds at the coarsest: what was modified just before it was hashed is hashed again.
    """
    with path.open("rb") as file:
        identity = _identity(os.fstat(file.fileno()))
        if identity not in _known_sha256:
            started = time.time_ns()
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if _identity(os.fstat(file.fileno())) != identity or started - identity[3] < _SETTLED_NS:
                return sha256
            _known_sha256[identity] = sha256
        return _known_sha256[identity]


def remember_sha256(path: Path, sha256: str) -> None:
    """Note the checksum of a file that this process has just written, in a folder that it has locked."""
    _known_sha256[_identity(path.stat())] = sha256


def _identity(facts: os.stat_result) -> tuple[int, int, int, int]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def digest_of(sha256_by_name: Mapping[str, str]) -> str:
    """Hex sha256 over names of files and their sha256, in the order of the names."""
    lines = (f"{name} {sha256_by_name[name]}\n" for name in sorted(sha256_by_name))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@cache
def code_digest() -> str:
    """sha256 of this package's own source: another version of the method may give another result."""
    root = Path(__file__).parent
    return digest_of({str(path.relative_to(root)): file_sha256(path) for path in root.rglob("*.py")})


def folder_sha256(folder: Path) -> str:
    """Hex sha256 over the names and contents of all files in a folder and below it."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return total.hexdigest()
