"""A model and how it is quantised: the checks before any work, and what the work takes."""

from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from slimgpt.checkpoints.companions import check_readable
from slimgpt.checkpoints.families import family_of, layer_shapes
from slimgpt.checkpoints.headers import raw_config
from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.checkpoints.origins import open_shards, read_config
from slimgpt.checkpoints.source import model_name
from slimgpt.checkpoints.weight_files import count_parameters
from slimgpt.checkpoints.whole import check_tensors
from slimgpt.config import QuantizeConfig
from slimgpt.data.calibration import Calibration, calibrate
from slimgpt.device import dtype_name, resolve_device
from slimgpt.equal_bits import conditions
from slimgpt.files import free_bytes
from slimgpt.method.shapes import LayerShape
from slimgpt.quantization.packages import locked_versions
from slimgpt.quantization.sizes import check_packing, fitting_group, inputs, matrices, misfit, stored_bytes

BITS = {"w4a16": 4, "w8a8": 8, "fp8": 8}
_IMPORTS = 700 << 20  # bytes: torch, transformers, llm-compressor
# Measured on 2 CPU cores with SmolLM2 (benchmarks/RESULTS.md): operations per second, and seconds of a column that is
# rounded in all rows of a matrix.
_OPERATIONS_PER_SECOND, _SECONDS_PER_COLUMN = 1.6e11, 1.4e-4


class QuantizationJob:
    """A model and its config, checked against each other; no weights have been read yet.

    Args:
        model: its folder.
        config: how it is quantised.
        shapes: widths that the model will have by then; None for those it has.

    Raises:
        ValueError: for an unsupported, quantised or incomplete model, or a group that does not divide its widths.
        PermissionError: where one of the model's files cannot be read.
    """

    def __init__(self, model: Path, config: QuantizeConfig, shapes: list[LayerShape] | None = None):
        if not config.scheme:
            raise ValueError(f"scheme is empty; it must be one of {', '.join(BITS)}")
        self.config, self.model = config, model
        self.model_config = read_config(model)
        self.family = family_of(self.model_config)
        stored = raw_config(model).get("model_type")
        if shapes is None and stored != self.model_config.model_type:  # what is pruned before is written as its family
            raise ValueError(f"{model} holds a {stored}, which is read, but not written; prune it first")
        self.device = resolve_device(config.device)
        self.shards = open_shards(model)
        check_tensors(self.shards, self.model_config)
        check_readable(model)
        self.shapes = shapes or layer_shapes(self.model_config)
        # Of all that is written: the projections', not that of norms, which may be wider.
        _, self.dtype = self.shards.shape(f"{self.family.layers}.0.{self.family.down}.weight")
        self.group = 0
        if config.scheme == "w4a16":
            check_packing(self.shapes)
            self.group = fitting_group(self.shapes, config.group_size)

    @cached_property
    def source(self) -> Checkpoint:
        """The model, hashed."""
        return Checkpoint.open(self.model)

    @property
    def model_name(self) -> str:
        """What others call it: never a path of this machine."""
        lineage = self.source.lineage
        return lineage.model_name if lineage.steps else model_name(self.model)

    @property
    def format(self) -> str:
        """In words: "weights in 4 bits, 64 to a scale"."""
        if self.config.scheme == "w4a16":
            return f"weights in 4 bits, {self.group or 'an entire row'} to a scale"
        kind = "integers" if self.config.scheme == "w8a8" else "floats"
        return f"weights and activations as 8-bit {kind}, a scale to each row and token"

    @property
    def remark(self) -> str:
        """Why the groups are no larger, or where the format is slow; empty where nothing is to be said."""
        if self.config.scheme == "fp8" and self.device.type == "cpu":
            return "for GPUs: on a CPU vLLM takes more than ten times as long with it as with w8a8"
        return misfit(self.shapes, self.group) if self.config.scheme == "w4a16" and not self.config.group_size else ""

    @cached_property
    def parameters(self) -> int:
        """Of the model as it is."""
        return count_parameters(self.model)

    @property
    def projections(self) -> int:
        """Parameters of the decoder's projections."""
        return sum(shape.parameters for shape in self.shapes)

    def bytes_after(self, size: int) -> int:
        """Expected size of the weight files, of a model whose files have ``size`` bytes."""
        bits = BITS[self.config.scheme]
        item = self.dtype.itemsize
        projections = tuple(f"{name}.weight" for name in (*self.family.rows, self.family.output, self.family.down))
        others = [name for name in self.shards.names() if not name.endswith(projections)]
        converted = sum(prod(self.shards.shape(name)[0]) for name in others) * item - self.shards.size(others)
        saved = sum(shape.parameters * item - stored_bytes(shape, bits, self.group, item) for shape in self.shapes)
        return size + converted - saved

    def disk_bytes(self, size: int) -> int:
        """That the run needs: the new model, once."""
        return int(1.02 * self.bytes_after(size)) + (16 << 20)

    def memory_bytes(self, size: int) -> int:
        """Estimated peak: the model, its packed copy, a layer's statistics, the activations between two layers."""
        c = self.config
        between = 4 * c.num_samples * c.seq_len * self.shapes[0].hidden_size * self.dtype.itemsize
        statistics = max(sum(4 * columns * columns for _, columns in matrices(shape)) for shape in self.shapes)
        widest = max(width for shape in self.shapes for width in inputs(shape))
        working = 5 * 4 * widest * max(widest, self.shapes[0].hidden_size) if c.reads_text else 0
        base = _IMPORTS if self.device.type == "cpu" else 0
        return base + size + self.bytes_after(size) + (between + statistics + working if c.reads_text else 0)

    @property
    def seconds(self) -> float:
        """Rough time, on two CPU cores."""
        columns = sum(columns for shape in self.shapes for _, columns in matrices(shape))
        if not self.config.reads_text:
            return 10 + 4e-8 * self.projections
        tokens = self.config.num_samples * self.config.seq_len
        forward = 2 * 2.0 * tokens * self.projections
        statistics = sum(2.0 * tokens * n * n for shape in self.shapes for _, n in matrices(shape))
        return 10 + (forward + statistics) / _OPERATIONS_PER_SECOND + columns * _SECONDS_PER_COLUMN

    def calibration(self) -> Calibration | None:
        """Read and tokenise the calibration text; None where the scheme needs none.

        Raises:
            ValueError, FileNotFoundError: when it is missing, empty or too short.
        """
        c = self.config
        if not c.reads_text:
            return None
        return calibrate(
            self.model, c.calibration, num_samples=c.num_samples, seq_len=c.seq_len, seed=c.seed, bos=c.bos
        )

    def facts(self, tokens: Calibration | None) -> dict[str, Any]:
        """All that the result depends on, bit for bit, besides the model."""
        return {
            "calibration": tokens.facts["ids_sha256"] if tokens else "",
            "scheme": self.config.scheme,
            "group": self.group,
            "dtype": dtype_name(self.dtype),
            **conditions(self.device),
            **locked_versions(),
        }

    def check_space(self, out: Path) -> None:
        """Refuse to start where the disk cannot hold the result.

        Raises:
            FileExistsError: where OUT is a file.
            OSError: with the free and the needed size.
        """
        free, need = free_bytes(out), self.disk_bytes(self.shards.bytes)
        if free < need:
            raise OSError(
                f"the disk of {out} has {free / 1e9:.2f} GB free; the quantised model needs {need / 1e9:.2f} GB"
            )


def worker_environment(device: torch.device) -> dict[str, str]:
    """What the process that quantises sees of the GPUs."""
    if device.type == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    return {"CUDA_VISIBLE_DEVICES": str(device.index)} if device.index else {}
