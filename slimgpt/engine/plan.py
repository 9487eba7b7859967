"""The dry run: what pruning would do and what is missing for it, said before any weight is read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimgpt.config import PruneConfig
from slimgpt.engine import cost
from slimgpt.engine.activations import choose_place
from slimgpt.engine.job import Job


@dataclass(frozen=True)
class PrunePlan:
    """The dry run: what would happen, and what is missing for it.

    Attributes:
        layers: per layer the dense and the planned widths and the ratio.
        memory_bytes, disk_bytes: estimated peak memory, and disk that the run needs.
        seconds: estimated, from operations counted and this device's rate in a matrix product, measured just now;
            reading the calibration text is not part of it.
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
    seconds: float
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
    costs = job.cost(choose_place(config.activations, job.device, job.cost().device))
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
        bytes_after=job.weight_bytes(),
        calibration=facts,
        memory_bytes=costs.memory,
        disk_bytes=costs.disk,
        seconds=sum(cost.measure_rates(job.device, job.dtype).seconds(costs).values()),
        layers=[
            {"layer": i, "ratio": r, "dense": d.overrides, "planned": p.overrides}
            for i, (r, d, p) in enumerate(zip(job.ratios, job.shapes, job.planned, strict=True))
        ],
        missing=missing,
    )
