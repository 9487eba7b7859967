"""What every width of every map costs in nats, kept in the cache.

Prices do not depend on the ratio: another ratio, a sweep or a budget in bytes finds them in the cache.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from slimgpt.checkpoints.shards import write_shard
from slimgpt.checkpoints.source import cache_folder
from slimgpt.config import PruneConfig
from slimgpt.data.calibration import Calibration
from slimgpt.engine.curvature import Curvature, LayerMoments, MapMoments
from slimgpt.engine.job import Job
from slimgpt.engine.overlap import WriteBehind
from slimgpt.engine.ranks import Ranks
from slimgpt.equal_bits import conditions
from slimgpt.files import digest_of, file_sha256, free_bytes, locked, write_atomically, writing
from slimgpt.method import obs
from slimgpt.method.allocation import ffn_widths
from slimgpt.method.nats import HeadOption, channel_prices, head_options, root

logger = logging.getLogger(__name__)

TABLES = "prices.json"  # written last: where it is, all is
_NOT_KEPT = "set SLIMGPT_CACHE to another folder"


@dataclass(frozen=True)
class LayerPrices:
    """One layer's options: layouts of its heads, and FFN widths with their nats, the dense ones first."""

    heads: tuple[HeadOption, ...]
    widths: tuple[tuple[int, float], ...]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``asdict``, from JSON."""
        heads = [{**option, "order": tuple(map(tuple, option["order"]))} for option in data["heads"]]
        return cls(
            tuple(HeadOption(**option) for option in heads), tuple((width, nats) for width, nats in data["widths"])
        )


class Prices:
    """Every layer's options and the roots R of its maps' curvatures.

    Args:
        folder: in the cache, complete.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def layers(self) -> list[LayerPrices]:
        """First to last."""
        layers: list[dict[str, Any]] = json.loads((self.folder / TABLES).read_text())["layers"]
        return [LayerPrices.from_dict(layer) for layer in layers]

    @property
    def whole(self) -> bool:
        """Whether all files are there as they were written."""
        try:
            roots = json.loads((self.folder / TABLES).read_text())["roots"]
            priced = len(self.layers) == len(roots) and all(layer.heads and layer.widths for layer in self.layers)
            return priced and all(file_sha256(self.folder / name) == sha256 for name, sha256 in roots.items())
        except (OSError, ValueError, TypeError, KeyError):
            return False

    def digest(self) -> str:
        """Of all files."""
        return digest_of({path.name: file_sha256(path) for path in sorted(self.folder.iterdir())})

    def roots(self, i: int) -> dict[str, Tensor]:
        """R of ``attention`` and of ``ffn`` ``[D, D]``."""
        return load_file(self.folder / _root_file(i))


def priced(
    job: Job,
    calibration: Calibration,
    ranks: Ranks,
    out: Path | None,
    on_priced: Callable[[int, int], None] | None = None,
) -> Prices:
    """The model's prices, from the cache or made now. Its files are the first rank's alone.

    Args:
        job: the model, and what may be pruned.
        calibration: the tokens.
        ranks: the processes that share them.
        out: where activations on disk go; None for the folder of temporary files.
        on_priced: called after each layer that is priced now, with how many are and the number of layers.

    Raises:
        OSError: when the cache cannot be written.
        ValueError: for gradients or activations that are not finite.
    """
    ids_NT = some_of(calibration.ids_NT, job.setting(processes=ranks.count).price_samples)
    folder, tokens = _place(job, ids_NT, ranks), ids_NT.numel()
    with ExitStack() as held:

        def known() -> bool:
            if Prices(folder).whole:
                return True
            _check_room(job, folder)
            with writing("the prices", folder, _NOT_KEPT):
                folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder, wait=True))  # another process may be making the same
            if Prices(folder).whole:
                return True
            if (folder / TABLES).is_file():
                logger.warning("the prices in %s are damaged; they are made again", folder)
                (folder / TABLES).unlink()
            return False

        if ranks.from_first(known):
            return Prices(folder)
        logger.info("prices of all widths: a forward and a backward pass over %d layers", len(job.shapes))
        layers: list[LayerPrices] = []
        behind = held.enter_context(WriteBehind(job.device))
        for moments in Curvature(job, ids_NT, ranks, out or Path(tempfile.gettempdir())).layers():
            layers.insert(0, ranks.from_first(partial(_price, job, moments, tokens, folder, behind)))
            if on_priced:
                on_priced(len(layers), len(job.shapes))

        def complete() -> None:
            behind.wait()
            roots = {name: file_sha256(folder / name) for name in map(_root_file, range(len(layers)))}
            table = json.dumps({"layers": [asdict(layer) for layer in layers], "roots": roots})
            with writing("the prices", folder, _NOT_KEPT):
                write_atomically(folder / TABLES, table)

        ranks.from_first(complete)
    return Prices(folder)


def check_cache(job: Job, calibration: Calibration) -> None:
    """Refuse a cache that cannot take the prices of one process; those that are in it need no more room.

    Raises:
        OSError: with what is free and what is needed, and the remedy.
    """
    ranks = Ranks()
    folder = _place(job, some_of(calibration.ids_NT, job.setting().price_samples), ranks)
    if job.config.schedule == "nats" and not Prices(folder).whole:
        _check_room(job, folder)


def _check_room(job: Job, folder: Path) -> None:
    """Two matrices ``[D, D]`` in float32 of each layer."""
    need, free = sum(2 * 4 * shape.hidden_size**2 for shape in job.shapes), free_bytes(folder)
    if free < need:
        raise OSError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free; the prices of this model need {need / 1e9:.2f} GB "
            f"there: {_NOT_KEPT}"
        )


def some_of(ids_NT: Tensor, count: int) -> Tensor:
    """So many sequences, or all, of every part of them alike: several texts stand there one after the other."""
    count = min(count, len(ids_NT))
    return ids_NT[torch.arange(count) * len(ids_NT) // count]


def _price(job: Job, moments: LayerMoments, tokens: int, folder: Path, behind: WriteBehind) -> LayerPrices:
    """One layer's options; writes its roots, behind what comes next."""
    i, config, shape, family = moments.layer, job.config, job.shapes[moments.layer], job.family
    heads: list[HeadOption] = [HeadOption(shape.num_heads, shape.num_kv_heads, (), 0.0)]
    roots = {}
    for name, part in (("attention", moments.attention), ("ffn", moments.ffn)):
        roots[name] = root(part.gradients.finish() / tokens).to(torch.float32)
    if family.prunes_heads:
        RW_DA, inverse = _ready(
            moments.tensors[f"{family.output}.weight"], moments.attention, roots["attention"], config
        )
        heads = head_options(RW_DA, inverse, shape.heads, tokens, unit=config.head_unit, multiple=config.head_multiple)
    RW_DF, inverse = _ready(moments.tensors[f"{family.down}.weight"], moments.ffn, roots["ffn"], config)
    widths = ffn_widths(shape.intermediate_size, config.ffn_multiple)
    nats = channel_prices(RW_DF, inverse, widths, tokens)

    def write() -> None:
        with writing("the prices", folder, _NOT_KEPT):
            write_shard(folder / _root_file(i), roots)

    behind(write)
    return LayerPrices(tuple(heads), tuple(zip(widths, nats, strict=True)))


def _ready(weight: Tensor, part: MapMoments, root_DD: Tensor, config: PruneConfig) -> tuple[Tensor, obs.Inverse]:
    """``R W`` and the damped inverse of H, in SOLVE_DTYPE."""
    H = part.inputs.finish()
    W = obs.silence_dead_columns(weight.to(H.device).to(H.dtype), H)
    return root_DD.to(H.device, H.dtype) @ W, obs.invert(H, config.percdamp, part.inputs.name)


def _root_file(i: int) -> str:
    return f"layer-{i:05d}.safetensors"


def _place(job: Job, ids_NT: Tensor, ranks: Ranks) -> Path:
    """In the cache, named after all that prices depend on, bit for bit."""
    config = job.config
    facts: dict[str, Any] = {
        "model": job.digest,
        "calibration": hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest(),
        "dtype": str(job.dtype),
        "processes": ranks.count,
        **conditions(job.device),
        **{name: getattr(config, name) for name in ("head_unit", "head_multiple", "ffn_multiple")},
        **{name: getattr(config, name) for name in ("percdamp", "block_tokens", "seed")},
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "prices" / key
