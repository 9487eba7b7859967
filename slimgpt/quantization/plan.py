"""The dry run: what quantising would do and what is missing for it, said before any weight is read."""

from dataclasses import dataclass, field
from pathlib import Path

from slimgpt.checkpoints.stage_folder import refuse_other_folder
from slimgpt.config import QuantizeConfig
from slimgpt.data.calibration import Calibration
from slimgpt.quantization.job import QuantizationJob
from slimgpt.quantization.packages import missing_packages
from slimgpt.quantization.quantizer import COMMAND, RUN, check_quantized_out


@dataclass(frozen=True)
class QuantizePlan:
    """What would happen.

    Attributes:
        model: its name.
        format: what is stored, in words; ``remark``: why its groups are no larger, or where it is slow.
        layers: how many.
        bytes_before, bytes_after: of the weight files.
        memory_bytes, disk_bytes, seconds: estimated.
        missing: one line each; empty when it could start.
        tokens: of the calibration text; None where none is read, or it is missing.
    """

    model: str
    format: str
    remark: str
    layers: int
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    disk_bytes: int
    seconds: float
    missing: list[str]
    tokens: Calibration | None = field(default=None, repr=False)


def plan(model: str | Path, config: QuantizeConfig, out: str | Path | None = None) -> QuantizePlan:
    """Say what ``quantize`` would do. Tokenises the text; reads no weights but for their checksum.

    Args:
        model: as of ``quantize``.
        config: as of ``quantize``.
        out: where the quantised checkpoint would go; its disk and what it holds are looked at.

    Raises:
        ValueError, FileNotFoundError: where ``quantize`` would refuse the model or the config.
    """
    job, tokens = QuantizationJob(Path(model), config), None
    missing = [line for line in [missing_packages()] if line]
    try:
        tokens = job.calibration()
    except (ValueError, OSError) as error:
        missing.append(str(error))
    if out is not None:
        try:
            refuse_other_folder(Path(out), RUN, COMMAND)
            check_quantized_out(Path(out).absolute(), job, tokens)
            job.check_space(Path(out))
        except OSError as error:
            missing.append(str(error))
    size = job.shards.bytes
    return QuantizePlan(
        model=job.model_name,
        format=job.format,
        remark=job.remark,
        layers=len(job.shapes),
        bytes_before=size,
        bytes_after=job.bytes_after(size),
        memory_bytes=job.memory_bytes(size),
        disk_bytes=job.disk_bytes(size),
        seconds=job.seconds,
        missing=missing,
        tokens=tokens,
    )
