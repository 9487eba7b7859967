"""Train a pruned model again, until it predicts what the dense one predicts.

slimgpt recover pruned out --tokens 131072        (minutes on 2 CPU cores with bfloat16 units)
"""

import logging
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from transformers import Trainer

from slimgpt.checkpoints.lineage import Checkpoint, Step
from slimgpt.checkpoints.loading import load_to_compute
from slimgpt.checkpoints.origins import read_config
from slimgpt.checkpoints.output_head import OutputHead
from slimgpt.checkpoints.stage_folder import refuse_other_folder
from slimgpt.config import RecoverConfig
from slimgpt.device import device_name, dtype_name
from slimgpt.engine.ranks import Ranks
from slimgpt.equal_bits import conditions, settle_vector_functions
from slimgpt.files import locked, writing
from slimgpt.recovery.answers import PROMPTS, answer
from slimgpt.recovery.job import RecoveryJob
from slimgpt.recovery.output import COMMAND, KEPT, RUN, STATES, RecoveryFolder
from slimgpt.recovery.student import Change, changes, load_student
from slimgpt.recovery.text import RecoveryText, draw
from slimgpt.recovery.training import (
    DistillationTrainer,
    OnStep,
    arguments_for,
    measure_as_written,
    newest,
    padded,
    seconds_until,
    train,
)
from slimgpt.usage import peak_memory

logger = logging.getLogger(__name__)
_ALONE = Lock()  # of the threads of a process: accelerate's state is the process's

_NAMED_BY_THEIR_EFFECT = ("bos", "device", "dtype", "teacher", "text", "tokens")
_PACKAGES = ("accelerate", "peft", "torch", "transformers")


def recover(
    model: str | Path,
    out: str | Path,
    config: RecoverConfig,
    *,
    teacher: str | Path | None = None,
    text: RecoveryText | None = None,
    on_step: OnStep | None = None,
) -> Checkpoint:
    """Train the pruned model in folder ``model`` into the new folder ``out``; its widths and its config stay.

    A run that was interrupted goes on from its last state when it is started again with the same arguments; on a CPU
    the result is the same, bit for bit. Called by every process that torchrun or accelerate started, it shares the
    sequences out among them; the first one writes.

    Args:
        model: a pruned checkpoint.
        out: where the recovered checkpoint goes.
        config: how it is trained.
        teacher: folder of the model it learns from; None for the one that the config or the lineage names.
        text: sequences to use instead of those that ``config.text`` names.
        on_step: called with the step, their number and what was measured: ``loss``, or ``eval_loss`` of the text that
            is held out, in nats per token.

    Raises:
        ValueError: for a model, teacher or config that cannot be trained, before long work; a loss that is no number.
        FileNotFoundError: when the teacher or the text is not found.
        FileExistsError: when ``out`` holds something else, or a run that differs; the message names what differs.
        BlockingIOError: when another process writes to ``out``.
        OSError: when the disk is too small.
    """
    ranks, out = Ranks(), Path(out).resolve()  # a state names the best one by its path
    ranks.from_first(lambda: refuse_other_folder(out, RUN, COMMAND))
    with ranks.together():
        job = RecoveryJob(Path(model), config, Path(teacher) if teacher else None, processes=ranks.count)
        text = text or draw(job.student.folder, job.config)
    folder: RecoveryFolder | None = None  # the first rank's alone
    with ExitStack() as held:
        held.enter_context(_ALONE)

        def begin() -> bool:
            nonlocal folder
            job.check_space(out)
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out))
            folder = RecoveryFolder(out, header_of(job, text, ranks.count))
            return folder.finished

        if ranks.from_first(begin):
            return Checkpoint.open(out)
        start = time.perf_counter()
        with ranks.together():
            trainer = _trainer(job, text, out / STATES)
            said = {"teacher": _answers(trainer.teacher, job)} if job.teacher is not None else {}
            said["pruned"] = _answers(trainer.model, job)
        if state := ranks.from_first(lambda: newest(out / STATES)):
            start -= seconds_until(state)
        with writing("a state of the training", out, KEPT):
            curve = train(trainer, state, on_step if ranks.first else None, lambda: time.perf_counter() - start)
        after = measure_as_written(trainer, lambda name: job.shards.load([name])[name])
        memory = max(ranks.gather(peak_memory(job.device)))

        def end() -> None:
            assert folder is not None, "only the first rank publishes"
            kept = _kept(trainer.model, curve[0][1], after)
            step = _step(job, text, (curve[0][1], after if kept else curve[0][1]), time.perf_counter() - start, memory)
            said["recovered"] = _answers(trainer.model, job, merged=True) if kept else said["pruned"]
            answers = [
                {"prompt": prompt} | {name: texts[i] for name, texts in said.items()}
                for i, prompt in enumerate(PROMPTS)
            ]
            folder.publish(job.student, kept, replace(step, answers=answers), curve)

        ranks.from_first(end)
        return Checkpoint.open(out)


def _answers(model: Any, job: RecoveryJob, *, merged: bool = False) -> list[str]:
    """What the model says; with ``merged`` its adapters are a part of the weights already."""
    if not hasattr(model, "peft_config"):
        return answer(model, job.student.folder)
    with model.disable_adapter() if merged else nullcontext():
        return answer(model.get_base_model(), job.student.folder)


def header_of(job: RecoveryJob, text: RecoveryText, processes: int = 1) -> dict[str, Any]:
    """All that the result depends on, bit for bit."""
    return {"model": job.student.digest, **facts_of(job, text, processes)}


def facts_of(job: RecoveryJob, text: RecoveryText, processes: int) -> dict[str, Any]:
    """What the result depends on, bit for bit, besides the model; part of the config is named by its effect."""
    config = {name: value for name, value in job.config.to_dict().items() if name not in _NAMED_BY_THEIR_EFFECT}
    return {
        "teacher": job.teacher.digest if job.teacher is not None else "",
        "text": text.facts["ids_sha256"],
        "dtype": dtype_name(job.dtype),
        "processes": processes,
        "steps": text.steps,
        **conditions(job.device),
        **{package: version(package) for package in _PACKAGES},
        **{f"config.{name}": value for name, value in config.items()},
    }


def _trainer(job: RecoveryJob, text: RecoveryText, states: Path) -> Trainer:
    settle_vector_functions()
    vocab_size = job.model_config.vocab_size
    arguments = arguments_for(job.config, text.steps, states, job.device, job.dtype, vocab_size)
    student = load_student(job.student.folder, job.model_config, job.family, job.config, job.dtype)
    given = {"model": student, "args": arguments, "train_dataset": text.train, "eval_dataset": text.held_out}
    if job.teacher is None:
        return Trainer(data_collator=padded, **given)
    teacher = load_to_compute(job.teacher.folder, job.dtype, read_config(job.teacher.folder))
    heads = [
        OutputHead(model.config, model.get_output_embeddings().weight.detach().to(arguments.device, job.dtype))
        for model in (student, teacher)
    ]
    return DistillationTrainer(teacher=teacher, student_head=heads[0], teacher_head=heads[1], **given)


def _kept(model: Any, before: float, after: float) -> dict[str, Change]:
    """The changes of the best state, which the model holds by now; none where that is no better than what came."""
    if after < before:
        return changes(model)
    logger.warning(
        "training did not lower the loss of the held-out text (%.4f, then %.4f); the weights stay as they came: try "
        "another learning_rate, or more tokens",
        before,
        after,
    )
    return {}


def _step(job: RecoveryJob, text: RecoveryText, losses: tuple[float, float], seconds: float, memory: int) -> Step:
    config, (before, after) = job.config, losses
    how = f"adapters of rank {config.rank}, merged" if config.trainable == "lora" else "all weights of the layers"
    if job.teacher is not None:
        aim, loss, name = f"to predict what {job.teacher_name} predicts", "KL of held-out text", "kl"
    else:
        aim, loss, name = "to give their answers", "cross entropy of held-out answers", "cross_entropy"
    return Step(
        step="recover",
        model=job.model_name,
        summary=(
            f"trained on {text.facts['tokens']:,} tokens of {text.facts['name']} {aim} ({how}; learning rate "
            f"{config.learning_rate:g}): {loss} {before:.3f} -> {after:.3f} nats per token"
            + ("" if after < before else "; training made it no better, so the weights are as they came")
        ),
        config={**config.to_dict(), "teacher": job.teacher_name, "dtype": dtype_name(job.dtype)},
        figures={
            "parameters_before": job.parameters,
            "parameters_after": job.parameters,
            "projections_before": job.projections,
            "projections_after": job.projections,
            "bytes_before": job.shards.bytes,
            "bytes_after": job.shards.bytes,
            f"{name}_before": before,
            f"{name}_after": after,
            "seconds": seconds,
            "peak_memory_bytes": memory,
        },
        data=text.facts,
        versions={package: version(package) for package in _PACKAGES},
        device=device_name(job.device),
        input=job.student.digest,
    )
