"""A pruned model, its teacher and the config it is trained with: the checks before any work."""

from functools import cached_property
from math import prod
from pathlib import Path

import torch

from slimgpt.checkpoints.companions import check_readable
from slimgpt.checkpoints.families import family_of, layer_shapes, positions
from slimgpt.checkpoints.headers import raw_config
from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.checkpoints.origins import open_shards, read_config
from slimgpt.checkpoints.source import model_name
from slimgpt.checkpoints.whole import check_tensors
from slimgpt.config import RecoverConfig
from slimgpt.device import has_fast_bfloat16, resolve_device
from slimgpt.files import free_bytes
from slimgpt.method.shapes import LayerShape
from slimgpt.recovery.teacher import check_vocabulary, find_teacher

KEPT_STATES = 3  # of the training: the best, the last, and the one that is being written
_ADAM, _FLOAT32 = 8, 4  # bytes of a trained parameter: its two moments, itself


class RecoveryJob:
    """Student, teacher and config, checked against each other; no weights have been read yet.

    Args:
        model: the student's folder.
        config: how it is trained.
        teacher: the teacher's folder; None for the one that the config or the lineage names.
        shapes: widths that the model will have when it is trained, pruned by then; None for those it has.
        processes: that share the training.

    Raises:
        ValueError: where they do not fit each other, or the device is none for training.
        FileNotFoundError: where the teacher is not found.
        PermissionError: where one of the model's files cannot be read.
    """

    def __init__(
        self,
        model: Path,
        config: RecoverConfig,
        teacher: Path | None = None,
        shapes: list[LayerShape] | None = None,
        processes: int = 1,
    ):
        self.config = config = config.filled(processes)
        self.device = _device(config)
        self.dtype = _dtype(config, self.device)
        self.model_config = read_config(model)
        self.family = family_of(self.model_config)
        stored = raw_config(model).get("model_type")
        if shapes is None and stored != self.model_config.model_type:  # what is pruned before is written as its family
            raise ValueError(f"{model} holds a {stored}, which is read, but not written; prune it first")
        self.shards = open_shards(model)
        check_tensors(self.shards, self.model_config)
        check_readable(model)
        self.shapes = shapes or layer_shapes(self.model_config)
        self.student = Checkpoint.open(model)
        self._check_length(self.student)
        self.teacher: Checkpoint | None = None  # where nothing is learned from one
        if config.method == "distill":
            self.teacher = Checkpoint.open(teacher or find_teacher(self.student, config.teacher))
            if self.teacher.digest == self.student.digest and shapes is None:
                raise ValueError(f"{self.teacher.folder} is the model that would learn from it; name another teacher")
            check_tensors(open_shards(self.teacher.folder), read_config(self.teacher.folder))
            check_vocabulary(self.teacher.folder, model)
            self._check_length(self.teacher)

    def _check_length(self, side: Checkpoint) -> None:
        if self.config.seq_len > (limit := positions(read_config(side.folder))):
            raise ValueError(
                f"seq_len is {self.config.seq_len}; {side.folder} reads at most {limit} tokens at once: lower seq_len"
            )

    @cached_property
    def teacher_name(self) -> str:
        """What others call it: never a path of this machine; empty where there is none."""
        if self.teacher is None:
            return ""
        steps = self.student.lineage.steps
        if steps and steps[0].input == self.teacher.digest:
            return steps[0].model
        return self.teacher.lineage.model_name if self.teacher.lineage.steps else model_name(self.teacher.folder)

    @cached_property
    def model_name(self) -> str:
        """The student's name."""
        return self.student.lineage.model_name if self.student.lineage.steps else model_name(self.student.folder)

    @property
    def projections(self) -> int:
        """Parameters of the student's projections."""
        return sum(shape.parameters for shape in self.shapes)

    @cached_property
    def parameters(self) -> int:
        """How many parameters the student has."""
        return sum(prod(self.shards.shape(name)[0]) for name in self.shards.names()) - self._pruned_until_then

    @cached_property
    def trained(self) -> int:
        """How many parameters are trained."""
        if self.config.trainable == "all":
            layers = self.shards.names(f"{self.family.layers}.")
            return sum(prod(self.shards.shape(name)[0]) for name in layers) - self._pruned_until_then
        matrices = (matrix for shape in self.shapes for matrix in self.family.matrices(shape))
        return sum(self.config.rank * (rows + columns) for rows, columns in matrices)

    @cached_property
    def _pruned_until_then(self) -> int:
        """Projection parameters that the folder holds, and the student will not have."""
        return sum(shape.parameters for shape in layer_shapes(self.model_config)) - self.projections

    @property
    def weight_bytes(self) -> int:
        """Of the student's weight files."""
        output = f"{self.family.layers}.0.{self.family.output}.weight"  # projections alone go, at their size
        return self.shards.bytes - self._pruned_until_then * self.shards.shape(output)[1].itemsize

    @property
    def disk_bytes(self) -> int:
        """Of the result and of the states of the training."""
        entire = self.parameters * _FLOAT32 if self.config.trainable == "all" else 0
        state = self.trained * _ADAM + (entire or self.trained * _FLOAT32)
        return int(1.02 * self.weight_bytes) + KEPT_STATES * state + (16 << 20)

    def check_space(self, out: Path) -> None:
        """Refuse to start where the disk cannot hold the result and the states of the training.

        Raises:
            FileExistsError: where OUT is a file.
            OSError: with the free and the needed size.
        """
        free = free_bytes(out)
        already = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.is_dir() else 0
        need = self.disk_bytes - already
        if free < need:
            raise OSError(
                f"the disk of {out} has {free / 1e9:.2f} GB free; the model and the states of its training need "
                f"{need / 1e9:.2f} GB"
            )


def _device(config: RecoverConfig) -> torch.device:
    device = resolve_device(config.device)
    if device.type == "cuda" and device.index:
        raise ValueError(
            f"device is {config.device}; training takes the first GPU that it sees: set CUDA_VISIBLE_DEVICES="
            f"{device.index} and device cuda"
        )
    return device


def _dtype(config: RecoverConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
