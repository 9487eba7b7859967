"""What pruning would do, said before it does it: first the checks, then widths, memory and disk."""

import shutil
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from .architectures import LayerShape, family_of, layer_shapes
from .calibration import Calibration, calibrate
from .checkpoint import Shards
from .config import PruneConfig
from .schedule import Budget, layer_ratios

TOLERANCE = 0.005  # the ratio is met within half a percentage point
IMPORTS_BYTES = 700 << 20  # resident memory of the process before it touches the model


class Job:
    """A model and what is asked of it, checked against each other; nothing heavy has been read yet.

    Raises:
        ValueError: for an unsupported, quantised or incomplete model, or a ratio that these options cannot reach.
    """

    def __init__(self, model: Path, config: PruneConfig):
        self.model, self.config = model, config
        if not (model / "config.json").is_file():
            raise FileNotFoundError(f"{model} has no config.json: name a model folder")
        self.model_config = AutoConfig.from_pretrained(model)
        self.family = family_of(self.model_config)
        self.shards = Shards(model)
        self.shapes = layer_shapes(self.model_config)
        self.ratios = layer_ratios(config, [shape.parameters for shape in self.shapes])
        self.device = _device(config.device)
        self.dtype = self._forward_dtype()
        self.base_model = getattr(self.model_config, "_name_or_path", "") or model.name
        if Path(self.base_model).is_dir():
            self.base_model = model.name  # a path of this machine says nothing to others
        self._check_multiples()
        self.planned = self._planned_shapes()

    def _forward_dtype(self) -> torch.dtype:
        if self.config.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.config.dtype]
        if self.device.type == "cpu":
            return torch.float32
        return self.shards.shape(f"{self.family.layers}.0.{self.family.query}.weight")[1]

    def _check_multiples(self) -> None:
        multiple = self.config.head_multiple
        for i, shape in enumerate(self.shapes):
            if shape.num_heads % multiple:
                raise ValueError(
                    f"layer {i} has {shape.num_heads} heads; head_multiple {multiple} does not divide them"
                )

    def _planned_shapes(self) -> list[LayerShape]:
        """Widths by layer.

        Only the data can tell which heads are worth their price, and for ``auto`` which kind of unit goes: the plan
        takes the largest that fits. The FFN makes up the difference, so the totals hold.
        """
        budget, shapes = Budget(self.config), []
        for shape, ratio in zip(self.shapes, self.ratios, strict=True):
            layout = shape.heads
            heads, kv_heads = layout.fill(
                budget.heads(ratio, layout.parameters, shape.parameters),
                self.config.head_unit,
                self.config.head_multiple,
            )
            removed = layout.parameters - layout.cost(heads, kv_heads)
            width = budget.ffn_width(
                ratio, shape.parameters, removed, shape.channel_parameters, shape.intermediate_size
            )
            shapes.append(replace(shape, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=width))
        reached = 1 - sum(s.parameters for s in shapes) / sum(s.parameters for s in self.shapes)
        if abs(reached - self.config.ratio) > TOLERANCE:
            raise ValueError(
                f"ratio {self.config.ratio} cannot be met: whole heads and FFN widths in multiples of "
                f"{self.config.ffn_multiple} give {reached:.3f}; lower ffn_multiple or head_multiple, "
                "choose another ratio, or prune heads and FFN both"
            )
        return shapes

    def calibration(self) -> Calibration:
        """Read and tokenise the calibration text.

        Raises:
            ValueError, FileNotFoundError: when it is missing, empty or too short.
        """
        c = self.config
        return calibrate(self.model, c.calibration, num_samples=c.num_samples, seq_len=c.seq_len, seed=c.seed)

    def layer_tensors(self, i: int) -> dict[str, torch.Tensor]:
        """The weights of decoder layer ``i`` on CPU, in the stored dtype, names relative to the layer."""
        prefix = f"{self.family.layers}.{i}."
        tensors = self.shards.load(self.shards.names(prefix))
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def rest_names(self) -> tuple[list[str], list[str]]:
        """Names of the tensors before and after the decoder layers; a tied output head is none."""
        rest = [name for name in self.shards.names() if not name.startswith(self.family.layers + ".")]
        if self.model_config.tie_word_embeddings:
            rest = [name for name in rest if name != "lm_head.weight"]
        return [n for n in rest if "embed_tokens" in n], [n for n in rest if "embed_tokens" not in n]

    @cached_property
    def _other_parameters(self) -> int:
        """Parameters that pruning never touches: all but the projections' weights (biases are counted as untouched)."""
        names = [name for part in self.rest_names() for name in part]
        norms = [
            n for n in self.shards.names(self.family.layers + ".") if prod(self.shards.shape(n)[0]) and "norm" in n
        ]
        return sum(prod(self.shards.shape(name)[0]) for name in names + norms)

    def parameters(self, shapes: list[LayerShape]) -> int:
        """Parameters of the whole model with these layer shapes."""
        return self._other_parameters + sum(shape.parameters for shape in shapes)

    def keeps_activations(self, shape: LayerShape) -> bool:
        """Whether one layer's channel activations of the whole calibration set fit the memory set aside for them."""
        tokens = self.config.num_samples * self.config.seq_len
        return tokens * shape.intermediate_size * self.dtype.itemsize <= self.config.keep_gib * 2**30

    def memory_bytes(self) -> int:
        """Estimated peak: residual stream and head outputs of all tokens, one layer, one block's activations, H."""
        tokens = self.config.num_samples * self.config.seq_len
        block = min(tokens, max(self.config.block_tokens, self.config.seq_len))
        item, peak = self.dtype.itemsize, 0
        for shape in self.shapes:
            hidden, wide = shape.hidden_size, shape.intermediate_size
            heads = shape.num_heads * shape.head_dim
            stream = tokens * (hidden + max(hidden, heads)) * item
            kept = tokens * wide * item if self.keeps_activations(shape) else 0
            layer = shape.parameters * (item + self.shards_itemsize)
            inner = block * (3 * wide * item + 4 * hidden * item + (4 * wide if item < 4 else 0))
            solve = wide * wide * (4 + 5 * 8) + heads * heads * 4
            peak = max(peak, stream + kept + layer + max(inner, solve))
        embeddings = sum(prod(self.shards.shape(n)[0]) for n in self.rest_names()[0]) * (item + self.shards_itemsize)
        base = IMPORTS_BYTES if self.device.type == "cpu" else 0
        return base + max(peak, embeddings + tokens * self.shapes[0].hidden_size * item)

    @cached_property
    def shards_itemsize(self) -> int:
        """Bytes per stored weight."""
        return self.shards.shape(f"{self.family.layers}.0.{self.family.query}.weight")[1].itemsize

    def disk_bytes(self) -> int:
        """Size of the pruned weight files."""
        return self.parameters(self.planned) * self.shards_itemsize

    def check_space(self, out: Path) -> None:
        """Refuse to start where the disk cannot hold the result.

        Raises:
            OSError: with the free and the needed size.
        """
        there = next(p for p in (out, *out.absolute().parents) if p.exists())
        if not there.is_dir():
            raise FileExistsError(f"{there} is a file; OUT must be a folder")
        already = sum(p.stat().st_size for p in out.glob("*.safetensors")) if out.is_dir() else 0
        free, need = shutil.disk_usage(there).free, int(1.02 * self.disk_bytes()) + (16 << 20) - already
        if free < need:
            raise OSError(f"the disk of {out} has {free / 1e9:.2f} GB free; the pruned model needs {need / 1e9:.2f} GB")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} is not usable here ({reason}); use cpu, cuda or auto") from None
    return device


@dataclass(frozen=True)
class PrunePlan:
    """The dry run: what would happen, and what is missing for it.

    Attributes:
        layers: per layer the dense and the planned widths and the ratio.
        memory_bytes, disk_bytes: estimated peak memory and size of the pruned weight files.
        missing: one line each; empty when pruning could start.
    """

    model: str
    model_type: str
    device: str
    dtype: str
    ratio: float
    model_ratio: float
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    calibration: dict[str, Any]
    memory_bytes: int
    disk_bytes: int
    layers: list[dict[str, Any]]
    missing: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def plan(model: str | Path, config: PruneConfig, out: str | Path | None = None) -> PrunePlan:
    """What ``prune`` would do. Tokenises the calibration text, reads no weights.

    Raises:
        ValueError: where ``prune`` would refuse the model or the config.
    """
    job = Job(Path(model), config)
    missing, facts = [], {"name": config.calibration, "tokens": config.num_samples * config.seq_len}
    try:
        facts = job.calibration().facts
    except (ValueError, OSError) as error:
        missing.append(str(error))
    if out is not None:
        try:
            job.check_space(Path(out))
        except OSError as error:
            missing.append(str(error))
    before, after = job.parameters(job.shapes), job.parameters(job.planned)
    return PrunePlan(
        model=job.base_model,
        model_type=job.model_config.model_type,
        device=str(job.device),
        dtype=str(job.dtype).removeprefix("torch."),
        ratio=(before - after) / sum(shape.parameters for shape in job.shapes),
        model_ratio=(before - after) / before,
        parameters_before=before,
        parameters_after=after,
        bytes_before=job.shards.bytes,
        bytes_after=job.disk_bytes(),
        calibration=facts,
        memory_bytes=job.memory_bytes(),
        disk_bytes=job.disk_bytes(),
        layers=[
            {"layer": i, "ratio": r, "dense": d.overrides, "planned": p.overrides}
            for i, (r, d, p) in enumerate(zip(job.ratios, job.shapes, job.planned, strict=True))
        ],
        missing=missing,
    )
