"""The OUT folder of a training: which run it is of, the states in between, and when it becomes a model."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimgpt.checkpoints.companions import copy_companions
from slimgpt.checkpoints.headers import CONFIG, INDEX
from slimgpt.checkpoints.lineage import LINEAGE, Checkpoint, Step
from slimgpt.checkpoints.shards import Shards, write_shard
from slimgpt.checkpoints.stage_folder import check_out
from slimgpt.files import commit, digest_of, file_sha256, json_bytes, link, write_atomically, writing
from slimgpt.recovery.student import Change
from slimgpt.report import REPORT

RUN = "recovery.json"
COMMAND = "slimgpt recover"
STATES = "training"
KEPT = "the training's states are kept"


class RecoveryFolder:
    """Owns OUT. A folder under construction holds recovery.json and training/, but no config.json.

    Args:
        out: the folder.
        header: what the result depends on, bit for bit.

    Raises:
        FileExistsError: when OUT holds something else, or another training; the message names what differs.
    """

    def __init__(self, out: Path, header: dict[str, Any]):
        self.out, self.header = out, header
        check_recovery_out(out, header)
        if not (out / RUN).is_file():
            write_atomically(out / RUN, json_bytes({"run": header}))

    @property
    def finished(self) -> bool:
        """Whether it is a model: config.json is written last.

        Raises:
            FileExistsError: where a file of the model was lost or changed since; the training's states are gone.
        """
        if not (self.out / CONFIG).is_file():
            return False
        try:
            steps = Checkpoint.open(self.out).lineage.steps
        except (ValueError, OSError) as error:
            raise FileExistsError(f"{self.out} holds a finished training, and {error}; or name another OUT") from None
        if not (self.out / LINEAGE).is_file() or not steps:
            raise FileExistsError(
                f"{self.out} holds a finished training and has lost its {LINEAGE}; copy it again, or name another OUT"
            )
        return True

    def publish(self, source: Checkpoint, changes: Mapping[str, Change], step: Step, curve: list[list[float]]) -> None:
        """Turn OUT into a model: ``source`` with its changed tensors, in files of the same names.

        Args:
            source: the model that was trained.
            changes: from what is stored to what is to be, by the tensor's name.
            step: for the lineage; its output is set here.
            curve: step and loss of the held-out text, each time that it was read.
        """
        shards = Shards(source.folder)
        with writing("the model", self.out, KEPT):
            for name in sorted(set(shards.files.values())):
                self._write(shards, name, changes)
            copy_companions(source.folder, self.out)
            code = [path.name for path in source.folder.glob("*.py")]
            for name in (*code, REPORT, INDEX):
                if (source.folder / name).is_file():
                    write_atomically(self.out / name, (source.folder / name).read_bytes())
            sha256_by_name = {name: file_sha256(self.out / name) for name in set(shards.files.values())}
            sha256_by_name[CONFIG] = file_sha256(source.folder / CONFIG)
            lineage = source.lineage.append(replace(step, output=digest_of(sha256_by_name)))
            write_atomically(self.out / LINEAGE, json_bytes(lineage.to_dict()))
            write_atomically(self.out / RUN, json_bytes({"run": self.header, "held_out_loss": curve}))
            write_atomically(self.out / CONFIG, (source.folder / CONFIG).read_bytes())
        shutil.rmtree(self.out / STATES, ignore_errors=True)

    def _write(self, shards: Shards, name: str, changes: Mapping[str, Change]) -> None:
        """One weight file; one that holds nothing new gets a second name, where the file system has such."""
        names = [tensor for tensor, file in shards.files.items() if file == name]
        if any(tensor in changes for tensor in names):
            stored = shards.load(names)
            write_shard(self.out / name, {tensor: changes.get(tensor, _same)(stored[tensor]) for tensor in names})
            return
        if not link(shards.folder / name, self.out / name):
            temporary = self.out / f"{name}.tmp"
            shutil.copyfile(shards.folder / name, temporary)
            commit(temporary, self.out / name)


def check_recovery_out(out: Path, header: dict[str, Any]) -> None:
    """Refuse a folder that holds something else than this training: a FileExistsError, as ``check_out`` raises."""
    check_out(out, RUN, header, "training", COMMAND)


def _same(stored: Any) -> Any:
    return stored
