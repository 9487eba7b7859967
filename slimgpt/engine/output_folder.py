"""The OUT folder while a model is pruned: what is finished, what an earlier run left, and when it becomes a model."""

import logging
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from slimgpt.checkpoints import pruned_form
from slimgpt.checkpoints.companions import companions, copy_companions
from slimgpt.checkpoints.headers import CONFIG
from slimgpt.checkpoints.lineage import LINEAGE, Checkpoint, Step
from slimgpt.checkpoints.shards import write_shard
from slimgpt.checkpoints.stage_folder import refuse_strangers
from slimgpt.data.calibration import Calibration
from slimgpt.device import dtype_name
from slimgpt.engine.job import Job
from slimgpt.engine.journal import JOURNAL, Journal
from slimgpt.equal_bits import conditions
from slimgpt.files import digest_of, file_sha256, link, writing
from slimgpt.report import LayerReport, PruneReport, load_report
from slimgpt.resuming import differences, remedy

logger = logging.getLogger(__name__)

FORMAT = 3  # of the journal; a change makes older journals unusable
KEPT = "finished layers are kept"
PLAN = "plan"
COMMAND = "slimgpt prune"


@dataclass(frozen=True)
class FinishedLayer:
    """What an earlier run decided for one layer: its report and its pruned tensors (names relative to the layer)."""

    report: LayerReport
    tensors: dict[str, Tensor]


class OutputFolder:
    """Owns OUT. Everything in it is complete or absent.

    Raises:
        FileExistsError: when OUT holds something that is not a pruning, or another pruning; the message names what.
    """

    def __init__(self, out: Path, job: Job, source: Checkpoint, calibration: Calibration, ranks: int = 1):
        self.out, self.job, self.source, self.ranks = out, job, source, ranks
        self.journal = Journal(out)
        header = self._header(calibration)
        entries = self.journal.read()
        if not entries:
            refuse_strangers(out, JOURNAL, COMMAND)
        elif entries[0] != header:
            raise FileExistsError(
                f"{out} holds another pruning: {differences(entries[0], header)}; {remedy(entries[0], header)}"
            )
        plans = [entry for entry in entries[1:] if entry["part"] == PLAN]
        self.plan = plans[0] if plans else None
        self.entries = self._trusted([e for e in entries[1:] if e["part"] != PLAN]) if entries else {}
        if not self.finished:
            with writing("the journal", out, KEPT):
                self.journal.rewrite([header, *plans, *self.entries.values()])

    def _header(self, calibration: Calibration) -> dict[str, Any]:
        """What the result depends on, bit for bit: two runs with the same header give the same files."""
        config, speed = self.job.config.to_dict(), self.job.speed
        return {
            "format": FORMAT,
            "model": self.job.digest,
            "calibration": calibration.facts["ids_sha256"],
            "dtype": dtype_name(self.job.dtype),
            "processes": self.ranks,  # sums are split among them
            **conditions(self.job.device),
            **{f"config.{key}": value for key, value in config.items() if key not in _NAMED_BY_ITS_EFFECT},
            **({"config.target_speedup": speed.speedup, "latency": speed.table.digest()} if speed else {}),
        }

    def follow(self, plan: dict[str, Any]) -> None:
        """Note the widths that were chosen, before the first layer; an interrupted run must have chosen the same.

        Raises:
            FileExistsError: when it had chosen others, which happens on a GPU when the cache was emptied in between.
        """
        entry = {"part": PLAN, **plan}
        if self.plan is None:
            with writing("the journal", self.out, KEPT):
                self.journal.append(entry)
            self.plan = entry
        elif self.plan != entry:
            raise FileExistsError(
                f"{self.out} holds another pruning: it was begun with other prices, which are no longer in the cache; "
                "name another OUT"
            )

    def _trusted(self, entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Entries whose files are on disk with the recorded sha256, up to the first layer that has to be made again."""
        trusted: dict[str, dict[str, Any]] = {}
        for entry in entries:
            path = self.out / entry["file"]
            if path.is_file() and file_sha256(path) == entry["sha256"]:
                trusted[entry["part"]] = entry
        for i in range(len(self.job.shapes)):
            if f"layer {i}" not in trusted:
                # a later layer was pruned on this one's output; make it again as well
                return {part: e for part, e in trusted.items() if part in {f"layer {j}" for j in range(i)}}
        return trusted

    @property
    def finished_layers(self) -> int:
        """How many layers, the first ones, need not be pruned again."""
        return sum(part.startswith("layer ") for part in self.entries)

    @property
    def finished(self) -> bool:
        """Whether every part is there, config.json, written last, and all that is published with it."""
        return len(self.entries) == len(self.job.shapes) + 2 and (self.out / CONFIG).is_file() and self._as_published

    @cached_property
    def _as_published(self) -> bool:
        """Whether the small files are those that were written; what an earlier run made of the weights is known."""
        try:
            load_report(self.out)
            steps = Checkpoint.open(self.out).lineage.steps
            beside = [self.out / LINEAGE, *companions(self.job.model, self.out)]
            whole = bool(steps) and all(path.is_file() for path in beside)
        except (ValueError, OSError):
            whole = False
        if not whole:
            logger.warning("%s: files beside the weights were lost or changed; they are written again", self.out)
        return whole

    def report(self) -> PruneReport:
        """The report of a finished run."""
        return load_report(self.out)

    def finished_layer(self, i: int) -> FinishedLayer:
        """What an earlier run left of layer ``i``, one of the first ``finished_layers``."""
        entry = self.entries[f"layer {i}"]
        prefix = f"{self.job.family.layers}.{i}."
        tensors = load_file(self.out / entry["file"])
        return FinishedLayer(
            LayerReport(**entry["report"]), {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        )

    def finish_layer(self, i: int, tensors: dict[str, Tensor], report: LayerReport) -> None:
        """Write a layer's shard (names relative to the layer), then its journal line."""
        prefix = f"{self.job.family.layers}.{i}."
        named = {prefix + name: tensor for name, tensor in tensors.items()}
        self._write(f"layer {i}", i + 1, named, report=asdict(report))

    def finish_rest(self) -> None:
        """Write everything that is not in a decoder layer: embeddings, final norm, output head (unless tied)."""
        before, after = self.job.rest_names()
        for part, index, names in (("before", 0, before), ("after", len(self.job.shapes) + 1, after)):
            if part not in self.entries and not self._link(part, index, names):
                self._write(part, index, self.job.shards.load(names))

    def _link(self, part: str, index: int, names: list[str]) -> bool:
        """Give the source's shard a second name where an earlier step wrote just these tensors: no second copy."""
        name = pruned_form.shard_name(index, len(self.job.shapes))
        held = [tensor for tensor, file in self.job.shards.files.items() if file == name]
        if not self.source.lineage.steps or sorted(held) != sorted(names):
            return False
        if not link(self.job.model / name, self.out / name):
            return False
        self._enter(part, name, file_sha256(self.out / name), names, self.job.shards.size(names))
        return True

    def _write(self, part: str, index: int, tensors: dict[str, Tensor], **facts: Any) -> None:
        name = pruned_form.shard_name(index, len(self.job.shapes))
        sizes = sum(t.numel() * t.itemsize for t in tensors.values())
        with writing(f"{name} ({sizes / 1e6:.1f} MB)", self.out, KEPT):
            sha256 = write_shard(self.out / name, tensors)
            self._enter(part, name, sha256, list(tensors), sizes, **facts)

    def _enter(self, part: str, file: str, sha256: str, tensors: list[str], size: int, **facts: Any) -> None:
        """Note in the journal that a part is finished."""
        entry = {"part": part, "file": file, "sha256": sha256, "tensors": sorted(tensors), "bytes": size, **facts}
        self.journal.append(entry)
        self.entries[part] = entry

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum((self.out / entry["file"]).stat().st_size for entry in self.entries.values())

    def publish(self, config: dict[str, Any], report: PruneReport, step: Step) -> None:
        """Turn the finished shards into a model, whose lineage is that of the source and ``step``."""
        weight_map = {name: entry["file"] for entry in self.entries.values() for name in entry["tensors"]}
        total = sum(entry["bytes"] for entry in self.entries.values())
        with writing("the model's small files", self.out, KEPT):
            copy_companions(self.job.model, self.out)
            sha256_by_name = {entry["file"]: entry["sha256"] for entry in self.entries.values()}
            output = digest_of({**sha256_by_name, CONFIG: pruned_form.config_sha256(config)})
            lineage = self.source.lineage.append(replace(step, output=output))
            pruned_form.publish(self.out, config, self.job.family, weight_map, total, report, lineage)


# Not compared by its setting: activations change no bit wherever they are, or if they are computed again, and of the
# others the header has what came of them (auto may be what was said by name before).
_NAMED_BY_ITS_EFFECT = ("activations", "bos", "calibration", "device", "dtype", "keep_gib")
