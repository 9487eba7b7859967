"""What a run of the paper takes, said before it: seconds, memory and disk."""

from dataclasses import dataclass
from pathlib import Path

from flows.paper.attempts import Attempt
from slimgpt.checkpoints.origins import read_config
from slimgpt.checkpoints.weight_files import count_parameters, weight_files
from slimgpt.config import EvalConfig
from slimgpt.data.text import perplexity_text
from slimgpt.device import compute_dtype, resolve_device
from slimgpt.engine.plan import plan
from slimgpt.engine.rates import CPU_SHARES, GPU_SHARES, measure_rates
from slimgpt.evaluation.harness_tasks import choose_tasks, load_tasks
from slimgpt.files import scratch
from slimgpt.recovery import cost as training
from slimgpt.recovery.job import RecoveryJob
from slimgpt.recovery.text import draw

_CHARACTERS = 4.0  # of a token, in English
# Rough: tasks of an evaluation, documents in all, and tokens that a document takes with all of its choices.
_TASKS = {"zero_shot": (7, 20_465, 300), "mmlu": (57, 14_042, 700), "longbench": (13, 2_600, 8_000)}


@dataclass(frozen=True)
class RunCost:
    """What a run takes, estimated.

    Attributes:
        seconds: of pruning, training and evaluation.
        memory: bytes at most.
        disk: bytes of the models.
        missing: one line each; empty when it could start.
    """

    seconds: float
    memory: int
    disk: int
    missing: list[str]


def cost_of(attempt: Attempt, dense: Path, device: str, tokens: float) -> RunCost:
    """Count what the run takes with the dense model in this folder, on this device. Reads no weights.

    Every evaluation is counted as one of the dense model; a benchmark is not counted.

    Args:
        attempt: the run.
        dense: folder of the model.
        device: as in the configs.
        tokens: that the evaluations of one model read.
    """
    size = sum((dense / name).stat().st_size for name in weight_files(dense))
    seconds, memory, disk, missing = 0.0, size, 0, []
    shapes = None
    if attempt.prune is not None:
        planned = plan(dense, attempt.prune)
        shapes = planned.shapes
        seconds, memory, disk = planned.seconds or 0.0, max(memory, planned.memory_bytes), planned.disk_bytes
        missing += planned.missing
    if attempt.recover is not None:
        job = RecoveryJob(dense, attempt.recover, shapes=shapes)
        try:
            seconds += training.seconds(job, draw(dense, job.config))
        except (ValueError, OSError) as error:
            missing.append(str(error))
        memory, disk = max(memory, training.memory_bytes(job)), disk + job.disk_bytes
    on = resolve_device(device)
    rate = measure_rates(on, compute_dtype("auto", on, read_config(dense).dtype)).forward
    share = (GPU_SHARES if on.type == "cuda" else CPU_SHARES)[0]
    each = 2 * count_parameters(dense) * tokens / (share * rate)
    return RunCost(seconds + len(attempt.run.sides) * each, memory, disk, missing)


def tokens_read(evaluations: dict[str, EvalConfig]) -> tuple[float, list[str]]:
    """Tokens that these evaluations read of one model, roughly, and what is missing for them, one line each."""
    tokens, missing = 0.0, []
    for name, config in evaluations.items():
        try:
            tokens += _tokens(name, config)
        except (ValueError, OSError) as error:
            missing.append(str(error))
    return tokens, missing


def _tokens(name: str, config: EvalConfig) -> float:
    """That an evaluation reads of one model."""
    if config.tasks:
        with scratch("slimgpt-check-") as place:
            load_tasks(choose_tasks(config.tasks), place, config.num_fewshot)
        tasks, documents, each = _TASKS[name]
        return each * (min(documents, tasks * config.limit) if config.limit else documents)
    text = sum(perplexity_text(config.perplexity).documents.lengths) / _CHARACTERS
    return min(text, config.max_blocks * config.seq_len) if config.max_blocks else text
