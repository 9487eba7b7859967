"""The dry run: what training would do and what is missing for it, said before any weight is read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimgpt.checkpoints.stage_folder import refuse_other_folder
from slimgpt.config import RecoverConfig
from slimgpt.device import dtype_name
from slimgpt.recovery import cost
from slimgpt.recovery.job import RecoveryJob
from slimgpt.recovery.output import COMMAND, RUN, check_recovery_out
from slimgpt.recovery.recoverer import header_of
from slimgpt.recovery.text import draw


@dataclass(frozen=True)
class RecoverPlan:
    """What would happen.

    Attributes:
        model, teacher: their names; no teacher where nothing is learned from one.
        trained: parameters that are trained; ``parameters`` are all.
        steps: of the optimizer.
        text: facts of the text: name, tokens in all, different tokens; its name alone where it is missing.
        memory_bytes, disk_bytes: estimated peak memory, and disk that the run needs.
        seconds: estimated, from operations counted and this device's rate in a matrix product, measured just now.
        missing: one line each; empty when training could start.
    """

    model: str
    teacher: str
    device: str
    dtype: str
    parameters: int
    trained: int
    steps: int
    text: dict[str, Any]
    memory_bytes: int
    disk_bytes: int
    seconds: float
    missing: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def plan(
    model: str | Path,
    config: RecoverConfig,
    out: str | Path | None = None,
    *,
    teacher: str | Path | None = None,
) -> RecoverPlan:
    """Say what ``recover`` would do. Tokenises the text; reads no weights but for their checksum.

    Args:
        model: as of ``recover``.
        config: as of ``recover``.
        out: where the recovered checkpoint would go; its disk and what it holds are looked at.
        teacher: as of ``recover``.

    Raises:
        ValueError, FileNotFoundError: where ``recover`` would refuse the model, the teacher or the config.
    """
    job, text, missing = RecoveryJob(Path(model), config, Path(teacher) if teacher else None), None, []
    try:
        text = draw(job.student.folder, job.config)
    except (ValueError, OSError) as error:
        missing.append(str(error))
    if out is not None:
        try:
            refuse_other_folder(Path(out), RUN, COMMAND)
            job.check_space(Path(out))
            if text is not None:
                check_recovery_out(Path(out).absolute(), header_of(job, text))
        except OSError as error:
            missing.append(str(error))
    return RecoverPlan(
        model=job.model_name,
        teacher=job.teacher_name,
        device=str(job.device),
        dtype=dtype_name(job.dtype),
        parameters=job.parameters,
        trained=job.trained,
        steps=text.steps if text else 0,
        text=text.facts if text else {"name": config.text},
        memory_bytes=cost.memory_bytes(job),
        disk_bytes=job.disk_bytes,
        seconds=cost.seconds(job, text) if text else 0.0,
        missing=missing,
    )
