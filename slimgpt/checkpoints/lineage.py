"""What was done to a model, step by step: ``lineage.json`` in its folder, and the checkpoint that it belongs to.

Pruning appends a step, and so does every later stage. Whatever describes a model (report, card, registry, ``inspect``)
reads the lineage and knows no particular stage. A folder made before there was a lineage holds ``pruning.json`` alone
and reads as one step.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from slimgpt.checkpoints.headers import CONFIG, read_json
from slimgpt.checkpoints.weight_files import count_parameters, weight_files
from slimgpt.files import digest_of, file_sha256
from slimgpt.report import REPORT, LayerReport, PruneReport, load_report

LINEAGE = "lineage.json"
_FORMAT = 1
_FIGURES = tuple(f"{name}_{side}" for name in ("parameters", "projections", "bytes") for side in ("before", "after"))
_FIGURES += ("seconds", "peak_memory_bytes")
_KEPT = ("kept_heads", "kept_kv_heads", "kept_channels")  # long, and in pruning.json


@dataclass(frozen=True, kw_only=True)
class Step:
    """How one checkpoint became another.

    Attributes:
        step: the stage: "prune", "recover" or "quantize".
        model: name of the checkpoint that it began from.
        summary: what was done, in one line for people.
        config: the stage's config.
        figures: ``parameters_``, ``projections_`` (parameters of the decoder's projections) and ``bytes_`` (of the
            weight files), each ``_before`` and ``_after``; ``seconds`` and ``peak_memory_bytes``; where the stage
            removes parameters, ``requested_ratio``, of the projections, and ``requested_size`` (bytes),
            ``requested_parameters`` or ``requested_speedup`` (with ``predicted_speedup``) where that was given instead;
            where it trains, ``kl_`` or ``cross_entropy_`` of held-out text, before and after.
        data: the text that it read: name, tokens, sha256, origin.
        layers: widths and errors of each layer; empty where the stage changes no widths.
        versions: of the packages that decide the result.
        device: what it ran on.
        answers: prompts and what the models said to them: ``prompt``, and by the model's name what it said.
        input, output: digest of the checkpoint before and after; empty where none was recorded.
    """

    step: str
    model: str
    summary: str
    config: dict[str, Any]
    figures: dict[str, float]
    data: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""
    answers: list[dict[str, str]] = field(default_factory=list)
    input: str = ""
    output: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As ``lineage.json`` holds it: without the indices of kept units."""
        data = dataclasses.asdict(self)
        data["layers"] = [{k: v for k, v in layer.items() if k not in _KEPT} for layer in data["layers"]]
        if not self.answers:
            del data["answers"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``; a ValueError names a figure that is missing, or no number."""
        figures = {**dict.fromkeys(_FIGURES), **data["figures"]}
        if lacking := [name for name, value in figures.items() if not isinstance(value, int | float)]:
            raise ValueError(f"step {data['step']} has no figure {lacking[0]}")
        return cls(**{**data, "layers": [LayerReport(**layer) for layer in data["layers"]]})


@dataclass(frozen=True)
class Lineage:
    """Every step from the first dense model on; none for a dense model."""

    steps: tuple[Step, ...] = ()

    def append(self, step: Step) -> "Lineage":
        """The lineage of what comes out of ``step``. An older step whose output is unknown led to its input."""
        earlier = self.steps
        if earlier and not earlier[-1].output:
            earlier = (*earlier[:-1], dataclasses.replace(earlier[-1], output=step.input))
        return Lineage((*earlier, step))

    def since(self, digest: str) -> "Lineage":
        """The steps after the checkpoint with this digest; all of them where no step began from it."""
        for i, step in enumerate(self.steps):
            if digest and step.input == digest:
                return Lineage(self.steps[i:])
        return self

    @property
    def base_model(self) -> str:
        """Name of the model that the first step began from; empty for a dense model."""
        return self.steps[0].model if self.steps else ""

    @property
    def model_name(self) -> str:
        """What the last step's model is called: "tiny after prune (15.0% removed)"."""
        return f"{self.base_model} after {self.names}" + (f" ({self.ratio:.1%} removed)" if self.ratio else "")

    @property
    def ratio(self) -> float:
        """Share of the first model's projection parameters that all steps together removed."""
        # A report without a lineage does not hold them where nothing was removed.
        before = next((n for step in self.steps if (n := step.figures["projections_before"])), 0)
        return (before - self.steps[-1].figures["projections_after"]) / before if before else 0.0

    @property
    def requested_ratio(self) -> float:
        """What ``ratio`` would be if the last pruning had removed all it was to, of what those before it left."""
        gone = [Lineage(self.steps[:i]).ratio for i, step in enumerate(self.steps) if "requested_ratio" in step.figures]
        return 1 - (1 - gone[-1]) * (1 - self.last_pruning("requested_ratio")) if gone else 0.0

    def last_pruning(self, figure: str) -> float:
        """A figure of the last pruning, such as ``requested_size``; 0 where it has none."""
        return next((s.figures for s in reversed(self.steps) if "requested_ratio" in s.figures), {}).get(figure, 0)

    @property
    def model_ratio(self) -> float:
        """Share of all of the first model's parameters that all steps together removed."""
        before = self.before("parameters")
        return (before - self.after("parameters")) / before if before else 0.0

    def before(self, figure: str) -> int:
        """``parameters``, ``projections`` or ``bytes`` of the model that the first step began from."""
        return int(self.steps[0].figures[f"{figure}_before"]) if self.steps else 0

    def after(self, figure: str) -> int:
        """``parameters``, ``projections`` or ``bytes`` of the last step's model."""
        return int(self.steps[-1].figures[f"{figure}_after"]) if self.steps else 0

    @property
    def names(self) -> str:
        """The steps' names: "prune, prune"."""
        return ", ".join(step.step for step in self.steps)

    @property
    def seconds(self) -> float:
        """Wall time of all steps."""
        return sum(step.figures["seconds"] for step in self.steps)

    @property
    def peak_memory_bytes(self) -> int:
        """Highest of all steps."""
        return int(max((step.figures["peak_memory_bytes"] for step in self.steps), default=0))

    @property
    def layers(self) -> list[LayerReport]:
        """Each layer's widths from the first model's to the last's; the errors are those of the last pruning."""
        if not (changed := [step.layers for step in self.steps if step.layers]):
            return []
        return [
            dataclasses.replace(
                last,
                dense_num_attention_heads=first.dense_num_attention_heads,
                dense_num_key_value_heads=first.dense_num_key_value_heads,
                dense_intermediate_size=first.dense_intermediate_size,
                ratio=1 - math.prod(1 - layers[i].ratio for layers in changed),
            )
            for i, (first, last) in enumerate(zip(changed[0], changed[-1], strict=True))
        ]

    def to_dict(self) -> dict[str, Any]:
        """As ``lineage.json`` holds it."""
        return {"format": _FORMAT, "steps": [step.to_dict() for step in self.steps]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_dict``."""
        if data["format"] != _FORMAT:
            raise ValueError(f"its format is {data['format']}; this version of slimgpt reads {_FORMAT}")
        if not isinstance(data["steps"], list) or not data["steps"]:  # a model without a step has no such file
            raise ValueError("it has no list of steps")
        return cls(tuple(Step.from_dict(step) for step in data["steps"]))


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, the digest of its weight files and config, and what was done to it."""

    folder: Path
    digest: str
    lineage: Lineage

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Read a folder; hashing its weights takes about a second per GB, once per process.

        Raises:
            ValueError: when it holds no complete model, or its lineage belongs to another one.
        """
        folder = Path(folder)
        lineage, digest = load_lineage(folder), checkpoint_digest(folder)
        check_output(lineage, digest, folder)
        return cls(folder, digest, lineage)


def load_lineage(folder: str | Path) -> Lineage:
    """Read what was done to the model in ``folder``; no steps for one that nothing was done to.

    Raises:
        ValueError: when ``lineage.json``, or an older folder's ``pruning.json``, is damaged or of another version.
    """
    if not (path := Path(folder) / LINEAGE).is_file():
        return Lineage((prune_step(load_report(folder)),)) if (Path(folder) / REPORT).is_file() else Lineage()
    data = read_json(path)
    try:
        return Lineage.from_dict(data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or of another version of slimgpt ({error}); fetch or make the model again"
        ) from None


def check_output(lineage: Lineage, digest: str, folder: Path) -> None:
    """Refuse a lineage that does not lead to the checkpoint with this digest: its figures are another model's.

    Raises:
        ValueError: naming the step and the remedy.
    """
    if lineage.steps and lineage.steps[-1].output not in ("", digest):
        raise ValueError(
            f"{folder}: the weights or config.json were changed after the last step of {LINEAGE} "
            f"({lineage.steps[-1].step}), so its figures are those of another model; make the model again, "
            f"or remove {LINEAGE} and {REPORT} to begin a new lineage"
        )


def check_parameters(lineage: Lineage, folder: Path) -> None:
    """Refuse weights that are incomplete, or not as many as the lineage says: from the files' headers alone.

    Raises:
        ValueError: naming both numbers and the remedy.
    """
    parameters = count_parameters(folder)
    if lineage.steps and parameters != lineage.after("parameters"):
        raise ValueError(
            f"the weights in {folder} hold {parameters:,} parameters and {REPORT} says "
            f"{lineage.after('parameters'):,}: this is not the model that was pruned; prune again, or remove {REPORT}"
        )


def checkpoint_digest(folder: Path) -> str:
    """sha256 over the names and contents of a model's weight files and its config.json.

    Raises:
        ValueError: when weight files are missing.
    """
    return digest_of({name: file_sha256(folder / name) for name in (*weight_files(folder), CONFIG)})


def prune_step(report: PruneReport, projections: tuple[int, int] | None = None, input_digest: str = "") -> Step:
    """A pruning as a step.

    Args:
        report: what pruning did.
        projections: parameters of the projections before and after; None: computed from the report's ratio.
        input_digest: of the checkpoint that was pruned.
    """
    removed = report.parameters_before - report.parameters_after
    if projections is None:
        before = round(removed / report.ratio) if report.ratio else 0
        projections = before, before - removed
    text, config = report.calibration, report.config
    return Step(
        step="prune",
        model=report.base_model,
        summary=(
            f"{report.ratio:.2%} of the parameters of the decoder's projections removed layer by layer, as heads and "
            f"FFN channels, and the rest refitted in closed form on {text.get('tokens', 0):,} tokens of "
            f"{text.get('name', 'unnamed text')} (schedule {config.get('schedule')}, seed {config.get('seed')})"
        ),
        config=config,
        figures={
            "ratio": report.ratio,
            "requested_ratio": report.ratio if "speedup" in report.requested else config.get("ratio", 0.0),
            "parameters_before": report.parameters_before,
            "parameters_after": report.parameters_after,
            "projections_before": projections[0],
            "projections_after": projections[1],
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "seconds": report.seconds,
            "peak_memory_bytes": report.peak_memory_bytes,
            **{f"requested_{name}": asked for name, asked in report.requested.items()},
            **({"predicted_speedup": report.predicted_speedup} if report.predicted_speedup else {}),
        },
        data=report.calibration,
        layers=report.layers,
        versions=report.versions,
        device=report.device,
        input=input_digest,
    )
