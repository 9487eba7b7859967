"""What a step's result depends on, as digests: the keys that Prefect's cache finds earlier results by."""

import hashlib
import json
from pathlib import Path

from slimgpt.checkpoints.lineage import LINEAGE
from slimgpt.engine.journal import JOURNAL
from slimgpt.files import digest_of, file_sha256
from slimgpt.report import REPORT

MADE_ANEW = (JOURNAL, REPORT, LINEAGE)  # hold times: they differ between two makings of the same model


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a model folder's files, about a second per GB; how it was made left out."""
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    return digest_of({path.name: file_sha256(path) for path in files if path.name not in MADE_ANEW})


def files_digest(folder: Path) -> str:
    """sha256 over the names and contents of all files that make up a model, below its folder too.

    Hidden files are left out, and the journal of its making: nothing reads it once the model is finished.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    hidden = {name for name in paths if any(part.startswith(".") for part in name.split("/"))}
    return digest_of({name: file_sha256(paths[name]) for name in paths.keys() - hidden - {JOURNAL}})


def facts_digest(facts: dict[str, object]) -> str:
    """sha256 of facts that JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
