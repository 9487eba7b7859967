"""The OUT folder of a stage that writes a small file about its run first, and config.json last."""

from pathlib import Path
from typing import Any

from slimgpt.checkpoints.headers import read_json
from slimgpt.files import check_writable
from slimgpt.resuming import differences, remedy


def check_out(out: Path, run_file: str, header: dict[str, Any], what: str, command: str) -> None:
    """Refuse a folder that holds something else than this run; one that is not there yet is fine.

    Args:
        out: the folder.
        run_file: the file that says what the run in it depends on.
        header: what this run depends on, bit for bit.
        what: such a run, in a word: "training".
        command: that makes such folders.

    Raises:
        FileExistsError: naming what it holds, or what differs.
        ValueError: when its file about the run is damaged.
    """
    if (out / run_file).is_file():
        before = read_json(out / run_file, "name another OUT").get("run", {})
        if not isinstance(before, dict):
            raise ValueError(f"{out / run_file} is damaged: its run is {before!r}, not an object; name another OUT")
        if before != header:
            raise FileExistsError(
                f"{out} holds another {what}: {differences(before, header)}; {remedy(before, header)}"
            )
    else:
        refuse_strangers(out, run_file, command)


def refuse_other_folder(out: Path, run_file: str, command: str) -> None:
    """Refuse a folder in which no run of this kind was begun, and none can be: before weights or a text are read.

    Raises:
        FileExistsError: naming what it holds.
        PermissionError: where it cannot be written to.
    """
    if not (out / run_file).is_file():
        refuse_strangers(out, run_file, command)
        check_writable(out)


def refuse_strangers(out: Path, run_file: str, command: str) -> None:
    """Refuse a folder that holds something else than its file about the run, or what is half-written.

    Raises:
        FileExistsError: naming what it holds.
    """
    names = sorted(path.name for path in out.iterdir() if not path.name.endswith(".tmp")) if out.is_dir() else []
    if names and names != [run_file]:
        raise FileExistsError(
            f"{out} is not empty and not an output of {command} (it holds {names[0]}); name another OUT"
        )
