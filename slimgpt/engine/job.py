"""A model and the config it is pruned with: the checks before any work, the widths, what the work costs."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path

import torch

from slimgpt.checkpoints.companions import check_readable
from slimgpt.checkpoints.families import family_of, layer_shapes
from slimgpt.checkpoints.headers import CONFIG
from slimgpt.checkpoints.lineage import load_lineage
from slimgpt.checkpoints.origins import open_shards, read_config
from slimgpt.checkpoints.source import model_name
from slimgpt.checkpoints.whole import check_tensors
from slimgpt.config import PruneConfig
from slimgpt.data.calibration import Calibration, calibrate
from slimgpt.device import compute_dtype, resolve_device
from slimgpt.engine.activations import Place, choose_place
from slimgpt.engine.budget import within_budget, within_time
from slimgpt.engine.cost import Cost, Setting, estimate, price_samples
from slimgpt.files import digest_of, file_sha256, free_bytes
from slimgpt.method.allocation import Allocation, planned_shapes
from slimgpt.method.latency import LatencyTable, SpeedTarget
from slimgpt.method.shapes import LayerShape
from slimgpt.usage import free_memory

logger = logging.getLogger(__name__)

HEADER_BYTES = 160  # of a tensor in a safetensors header: its name, dtype, shape and place
CPU_KEEP = 4 << 30  # bytes for one layer's channel activations
FREE_SHARE = 0.9  # of a GPU's free memory that a run plans with: what torch holds comes in pieces, which do not all fit


class Job:
    """A model and its config, checked against each other; nothing heavy has been read yet.

    Args:
        model: its folder.
        config: how it is pruned.
        shapes: widths that the model will have by then; None for those it has.
        latency: what its units take in an engine, for a target in speed.

    Attributes:
        speed: the target in speed; None where there is none.

    Raises:
        ValueError: for an unsupported, quantised or incomplete model, or a ratio that these options cannot reach.
        PermissionError: where one of the model's files cannot be read.
    """

    def __init__(
        self,
        model: Path,
        config: PruneConfig,
        shapes: list[LayerShape] | None = None,
        latency: LatencyTable | None = None,
    ):
        self.model = model
        self.model_config = read_config(model)
        self.family = family_of(self.model_config)
        self.config = self._prunable(config)
        self.lineage = load_lineage(model)
        self.shards = open_shards(model)
        self.shapes = shapes or layer_shapes(self.model_config)
        self.device = resolve_device(config.device)
        stored = self.shards.shape(f"{self.family.layers}.0.{self.family.output}.weight")[1]
        check_tensors(self.shards, self.model_config)
        check_readable(model)
        self.dtype = compute_dtype(self.config.dtype, self.device, self.model_config.dtype or stored)
        self.base_model = self.lineage.model_name if self.lineage.steps else model_name(model)
        self._check_multiples()
        target = self.config.target
        self.requested = {target[0].removeprefix("target_"): target[1]} if target else {}
        self.speed: SpeedTarget | None = None
        if self.config.target_speedup:
            self.config, self.speed = within_time(self.config, self.shapes, latency)
        self.config = within_budget(
            self.config,
            self.shapes,
            self.parameters,
            item=min(self._projection_items),
            beside=self._bytes_beside(),
        )
        self.planned = planned_shapes(self.config, self.shapes)

    def _prunable(self, config: PruneConfig) -> PruneConfig:
        """The config for what the family allows."""
        if self.family.prunes_heads or config.targets == "ffn":
            return config
        reason = (
            f"{self.family.model_type}: removing a head would rescale the others (its q and k norms span all heads)"
        )
        if config.targets == "attention":
            raise ValueError(f"{reason}; use targets ffn")
        logger.warning("%s: only its FFN is pruned", reason)
        return replace(config, targets="ffn")

    def _check_multiples(self) -> None:
        multiple = self.config.head_multiple
        for i, shape in enumerate(self.shapes):
            if shape.num_heads % multiple:
                raise ValueError(
                    f"layer {i} has {shape.num_heads} heads; head_multiple {multiple} does not divide them"
                )

    def allocation(self) -> Allocation:
        """How many units go where, from the first layer on."""
        return Allocation(self.config, self.shapes)

    def calibration(self) -> Calibration:
        """Read and tokenise the calibration text.

        Raises:
            ValueError, FileNotFoundError: when it is missing, empty or too short.
        """
        c = self.config
        return calibrate(
            self.model, c.calibration, num_samples=c.num_samples, seq_len=c.seq_len, seed=c.seed, bos=c.bos
        )

    @cached_property
    def digest(self) -> str:
        """Of the weights and of config.json: what the model computes depends on both."""
        return digest_of({"weights": self.shards.digest(), CONFIG: file_sha256(self.model / CONFIG)})

    def layer_tensors(self, i: int) -> dict[str, torch.Tensor]:
        """The weights of decoder layer ``i`` on CPU, in the stored dtype, names relative to the layer."""
        prefix = f"{self.family.layers}.{i}."
        tensors = self.shards.load(self.layer_names(i), pinned=self.device.type == "cuda")
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def layer_names(self, i: int) -> list[str]:
        """Names of the tensors of decoder layer ``i``; old checkpoints also store what transformers computes."""
        names = self.shards.names(f"{self.family.layers}.{i}.")
        return [name for name in names if not name.endswith("rotary_emb.inv_freq")]

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.shards.names())

    def rest_names(self) -> tuple[list[str], list[str]]:
        """Names of the tensors before and after the decoder layers; a tied output head is none."""
        rest = [name for name in self.shards.names() if not name.startswith(self.family.layers + ".")]
        if self.model_config.tie_word_embeddings:
            rest = [name for name in rest if name != "lm_head.weight"]
        return [n for n in rest if "embed_tokens" in n], [n for n in rest if "embed_tokens" not in n]

    @cached_property
    def _other_names(self) -> list[str]:
        """Names of the tensors that pruning never touches: all but the projections."""
        names = [name for part in self.rest_names() for name in part]
        rows = {f"{projection}.weight" for projection in self.family.rows} | {f"{p}.bias" for p in self.family.rows}
        columns = {f"{self.family.output}.weight", f"{self.family.down}.weight"}
        for i in range(len(self.shapes)):
            prefix = f"{self.family.layers}.{i}."
            names += [name for name in self.layer_names(i) if name.removeprefix(prefix) not in rows | columns]
        return names

    @cached_property
    def _other_parameters(self) -> int:
        return sum(prod(self.shards.shape(name)[0]) for name in self._other_names)

    def parameters(self, shapes: list[LayerShape]) -> int:
        """Parameters of the whole model with these layer shapes."""
        biases = [units for p, units in self.family.rows.items() if f"{self.family.layers}.0.{p}.bias" in self._names]
        return self._other_parameters + sum(
            shape.parameters + sum(shape.width(unit) for units in biases for unit in units) for shape in shapes
        )

    def setting(self, place: Place = "device", processes: int = 1) -> Setting:
        """What the cost of pruning depends on beside the widths; ``place`` is where activations wait.

        On a GPU it says what is free there at this moment.
        """
        setting = self._setting(place, processes)
        if self.config.keep_gib >= 0:
            return replace(setting, keep=int(self.config.keep_gib * 2**30))
        if setting.cpu:
            return replace(setting, keep=CPU_KEEP)
        return replace(setting, keep=max(0, int(FREE_SHARE * free_memory(self.device)) - self._cost(setting).device))

    def _setting(self, place: Place, processes: int) -> Setting:
        """With nothing kept."""
        c = self.config
        widest = max(shape.intermediate_size for shape in self.shapes)
        few = price_samples(widest, c.num_samples, c.seq_len, processes)
        return Setting(
            samples=c.num_samples,
            seq_len=c.seq_len,
            block_tokens=c.block_tokens,
            item=self.dtype.itemsize,
            stored=max(self._projection_items),
            keep=0,
            cpu=self.device.type == "cpu",
            place=place,
            processes=processes,
            price_samples=few if c.schedule == "nats" else 0,
        )

    def cost(self, place: Place = "device", processes: int = 1) -> Cost:
        """Operations, bytes, peak memory and disk."""
        return self._cost(self.setting(place, processes))

    def place(self, processes: int = 1) -> Place:
        """Where activations wait: as the config says; where it leaves that open, on the device if they fit there."""
        need = 0 if self.device.type == "cpu" else self._cost(self._setting("device", processes)).device
        return choose_place(self.config.activations, self.device, need)

    def _cost(self, setting: Setting) -> Cost:
        embeddings = self.rest_names()[0]
        return estimate(
            self.shapes,
            self.planned,
            setting,
            embedding=sum(prod(self.shards.shape(name)[0]) for name in embeddings),
            embedding_bytes=self.shards.size(embeddings),
            weight_bytes=self.weight_bytes(self.planned),
        )

    def weight_bytes(self, shapes: list[LayerShape]) -> int:
        """Bytes of the whole model's weights with these layer shapes, each tensor in its own dtype."""
        return self.shards.size(self._other_names) + sum(n * item for n, item in self._projection_tensors(shapes))

    def _projection_tensors(self, shapes: list[LayerShape]) -> Iterator[tuple[int, int]]:
        """Numbers in each tensor that pruning makes smaller, and bytes of one: checkpoints may mix dtypes."""
        names = (*self.family.rows, self.family.output, self.family.down)
        for i, shape in enumerate(shapes):
            for projection, (rows, columns) in zip(names, self.family.matrices(shape), strict=True):
                name = f"{self.family.layers}.{i}.{projection}"
                yield rows * columns, self.shards.shape(f"{name}.weight")[1].itemsize
                if projection in self.family.rows and f"{name}.bias" in self._names:
                    yield rows, self.shards.shape(f"{name}.bias")[1].itemsize

    @cached_property
    def _projection_items(self) -> set[int]:
        """Bytes of a projection's stored number: one size, unless the projections themselves differ."""
        return {item for _, item in self._projection_tensors(self.shapes)}

    def _bytes_beside(self) -> int:
        """What the weight files hold beside the projections' item size for each parameter.

        That is headers, and what all other tensors take more; it is below 0 where they take less.
        """
        more = self.weight_bytes(self.shapes) - min(self._projection_items) * self.parameters(self.shapes)
        return HEADER_BYTES * len(self._names) + more

    def check_space(self, out: Path) -> None:
        """Refuse to start where the disk cannot hold the result.

        Raises:
            OSError: with the free and the needed size.
        """
        free = free_bytes(out)
        already = sum(p.stat().st_size for p in out.glob("*.safetensors")) if out.is_dir() else 0
        need = int(1.02 * self.weight_bytes(self.planned)) + (16 << 20) - already
        if free < need:
            raise OSError(f"the disk of {out} has {free / 1e9:.2f} GB free; the pruned model needs {need / 1e9:.2f} GB")
