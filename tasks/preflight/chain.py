"""A chain of stages, each of which reads one checkpoint and writes another: checked entirely before the first begins.

A new stage is a module in ``slimgpt`` (or a library call), a task file with a ``Stage``, a line in the flow's list and
a section of the config.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.checkpoints.weight_files import weight_files
from slimgpt.data.calibration import Calibration
from slimgpt.method.shapes import LayerShape
from slimgpt.report import LayerReport
from tasks.digests import folder_digest
from tasks.environment import RunFolder
from tasks.preflight.models import ResolvedModel

Keep = Literal["last", "all"]


@dataclass(frozen=True)
class Watch:
    """What is told of a stage's work while it runs.

    Args:
        layer: called after each layer of a stage that goes layer by layer.
        step: called with the step and what was measured, by a stage that trains.
    """

    layer: Callable[[LayerReport], None]
    step: Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Expected:
    """The model that a stage will read, as far as it can be known before the stages in front of it have run.

    Args:
        first: the model that the chain begins with: family, tokenizer and dtype stay the same.
        size: bytes of the weight files.
        shapes: widths of each layer; None for those of the first model.
        ratio: share of the first model's projection parameters that will be gone.
        tokens: calibration tokens that were made already, for stages that read the same text.
    """

    first: Checkpoint
    size: int
    shapes: list[LayerShape] | None = None
    ratio: float = 0.0
    tokens: Calibration | None = field(default=None, repr=False, compare=False)


@runtime_checkable  # pydantic asks for it where a flow takes chains or stages
class PlannedStage(Protocol):
    """A stage that has passed its check."""

    @property
    def name(self) -> str:
        """Of the step in the lineage."""

    @property
    def facts(self) -> dict[str, Any]:
        """All that the result depends on, bit for bit, besides the model."""

    @property
    def bytes_after(self) -> int:
        """Expected size of the weight files."""

    @property
    def disk_bytes(self) -> int:
        """That the stage needs in its folder."""

    @property
    def memory_bytes(self) -> int:
        """Estimated peak."""

    @property
    def seconds(self) -> float:
        """Estimated; where that takes a measurement, it is made now."""

    @property
    def after(self) -> Expected:
        """The model that it will probably leave."""

    def run(self, source: Checkpoint, out: Path, facts: dict[str, Any], watch: Watch | None = None) -> Checkpoint:
        """Make the checkpoint ``out`` of ``source``; what an earlier run made of the same ``facts`` is used again."""


@runtime_checkable
class Stage(Protocol):
    """What a flow lists: a stage and its config."""

    def plan(self, model: Expected) -> PlannedStage:
        """Check everything that can be known now.

        Raises:
            ValueError: one line with all that is wrong.
        """


@dataclass(frozen=True)
class Chain:
    """Stages that have passed their checks, one after another."""

    dense: ResolvedModel
    stages: tuple[PlannedStage, ...]

    def facts(self, stages: int | None = None) -> dict[str, Any]:
        """All that the result of the first ``stages`` (None: of all) depends on, bit for bit."""
        facts = [stage.facts for stage in self.stages[:stages]]
        return {"model": folder_digest(self.dense.folder), "stages": facts}

    def outs(self, folder: RunFolder) -> list[Path]:
        """Where each stage's checkpoint goes; the last one's is the run's model."""
        between = [folder.stage(i, stage.name) for i, stage in enumerate(self.stages[:-1], start=1)]
        return [*between, folder.model]

    def missing_bytes(self, folder: RunFolder, keep: Keep) -> int:
        """What the disk must still hold, at its fullest: with ``keep`` "last" a stage's source and what it makes."""
        outs = self.outs(folder)
        if keep == "last" and (outs[-1] / "config.json").is_file():  # written last
            return 0
        sizes = [_missing(stage, out) for stage, out in zip(self.stages, outs, strict=True)]
        return sum(sizes) if keep == "all" else max(map(sum, zip([0, *sizes], sizes, strict=False)))


def plan_chain(dense: ResolvedModel, stages: Sequence[Stage], tokens: Calibration | None = None) -> Chain:
    """Check every stage, each on the model that the one before it will probably leave.

    Args:
        dense: the model that the first stage reads.
        stages: in their order.
        tokens: calibration tokens that were made already, of this model and the same text.

    Raises:
        ValueError: from the first stage that cannot work, with its name where there are several.
    """
    planned: list[PlannedStage] = []
    size = sum((dense.folder / name).stat().st_size for name in weight_files(dense.folder))
    expected = Expected(dense.checkpoint, size, tokens=tokens)
    for i, stage in enumerate(stages, start=1):
        try:
            planned.append(stage.plan(expected))
        except ValueError as error:
            raise ValueError(f"stage {i} of {len(stages)}: {error}" if len(stages) > 1 else str(error)) from None
        expected = planned[-1].after
    return Chain(dense, tuple(planned))


def _missing(stage: PlannedStage, out: Path) -> int:
    """Bytes that are still to be written of a stage's checkpoint."""
    if (out / "config.json").is_file():
        return 0
    return max(0, stage.disk_bytes - sum(file.stat().st_size for file in out.glob("*.safetensors")))
