"""The dry run: what pruning would do and what is missing for it, said before any weight is read."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slimgpt.checkpoints.stage_folder import refuse_other_folder
from slimgpt.config import PruneConfig
from slimgpt.data.calibration import Calibration
from slimgpt.device import dtype_name
from slimgpt.engine.job import Job
from slimgpt.engine.journal import JOURNAL
from slimgpt.engine.output_folder import COMMAND
from slimgpt.engine.prices import check_cache
from slimgpt.engine.pruner import measured_widths
from slimgpt.engine.rates import measure_rates
from slimgpt.method.allocation import width_bounds
from slimgpt.method.latency import LatencyTable
from slimgpt.method.shapes import LayerShape
from slimgpt.report import LayerReport


@dataclass(frozen=True)
class PrunePlan:
    """The dry run: what would happen, and what is missing for it.

    Attributes:
        measured: the planned widths are those that pruning gives, since its decisions were made.
        layers: per layer its ratio and the widths ``dense``, ``planned``, and ``least`` and ``most``, between which
            they can come out. Where these two differ, the widths depend on the calibration data, and ``planned`` is one
            case.
        memory_bytes, disk_bytes: estimated peak memory, and disk that the run needs.
        seconds: estimated, from operations counted and this device's rate in a matrix product, measured just now;
            reading the calibration text is not part of it. None where it was not requested.
        missing: one line each; empty when pruning could start.
        requested, predicted_speedup: as of a report; the latter is of the planned widths.
        shapes: the planned widths, for the plan of a step that follows.
        tokens: the calibration tokens that were made for it, for ``prune``; None where they are missing.
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
    seconds: float | None
    measured: bool
    layers: list[dict[str, Any]]
    missing: list[str]
    requested: dict[str, float]
    predicted_speedup: float
    shapes: list[LayerShape] = field(repr=False, compare=False)
    tokens: Calibration | None = field(repr=False, compare=False)

    @property
    def depends_on_data(self) -> bool:
        """Whether pruning can come out with other widths than the planned ones."""
        return any(layer["least"] != layer["most"] for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, without the tokens."""
        data = asdict(replace(self, tokens=None))
        del data["tokens"], data["shapes"]  # the layers hold the widths
        return data


def plan(
    model: str | Path,
    config: PruneConfig,
    out: str | Path | None = None,
    *,
    calibration: Calibration | None = None,
    shapes: list[LayerShape] | None = None,
    latency: LatencyTable | None = None,
    measure: bool = False,
    estimate_seconds: bool = True,
    on_layer: Callable[[LayerReport, int], None] | None = None,
    on_priced: Callable[[int, int], None] | None = None,
) -> PrunePlan:
    """Say what ``prune`` would do. Tokenises the calibration text; reads no weights, unless it measures.

    Args:
        model: as of ``prune``.
        config: as of ``prune``.
        out: where the pruned checkpoint would go; its disk and what it holds are looked at.
        calibration: token ids to use instead of those that ``config.calibration`` names.
        shapes: widths that the model will have when it is pruned, after steps that are still to come; None for those
            it has.
        latency: as of ``prune``.
        measure: make the decisions, in the time that prices take, or pruning where there are none, and write nothing:
            gives the widths where they depend on the calibration data.
        estimate_seconds: measure this device's rate in a matrix product.
        on_layer: as of ``prune``, while it measures.
        on_priced: the same.

    Raises:
        ValueError: where ``prune`` would refuse the model or the config.
    """
    job = Job(Path(model), config, shapes, latency)
    missing, facts = [], {"name": config.calibration, "tokens": config.num_samples * config.seq_len}
    try:
        calibration = calibration or job.calibration()
        facts = calibration.facts
    except (ValueError, OSError) as error:
        missing.append(str(error))
    if out is not None:
        try:
            refuse_other_folder(Path(out), JOURNAL, COMMAND)
            job.check_space(Path(out))
            if calibration is not None:
                check_cache(job, calibration)
        except OSError as error:
            missing.append(str(error))
    planned, bounds = job.planned, width_bounds(job.config, job.shapes)
    if measured := measure and calibration is not None:
        planned = measured_widths(job, calibration, on_layer, on_priced)
        bounds = [(shape, shape) for shape in planned]
    before, after = job.parameters(job.shapes), job.parameters(planned)
    costs = job.cost(job.place())
    seconds = sum(measure_rates(job.device, job.dtype).seconds(costs).values()) if estimate_seconds else None
    return PrunePlan(
        model=job.base_model,
        model_type=job.model_config.model_type,
        device=str(job.device),
        dtype=dtype_name(job.dtype),
        ratio=(before - after) / sum(shape.parameters for shape in job.shapes),
        model_ratio=(before - after) / before,
        parameters_before=before,
        parameters_after=after,
        bytes_before=job.weight_bytes(job.shapes) if shapes else job.shards.bytes,
        bytes_after=job.weight_bytes(planned),
        calibration=facts,
        memory_bytes=costs.memory,
        disk_bytes=costs.disk,
        seconds=seconds,
        measured=measured,
        layers=[
            {
                "layer": i,
                "ratio": ratio,
                "dense": job.shapes[i].overrides,
                "planned": planned[i].overrides,
                "least": bounds[i][0].overrides,
                "most": bounds[i][1].overrides,
            }
            for i, ratio in enumerate(job.allocation().ratios)
        ],
        missing=missing,
        requested=job.requested,
        predicted_speedup=job.speed.table.speedup(planned) if job.speed else 0.0,
        shapes=planned,
        tokens=calibration,
    )
