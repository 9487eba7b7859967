"""The training itself: transformers' Trainer with the distillation's loss, and where an interrupted one goes on."""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from slimgpt.checkpoints.output_head import OutputHead
from slimgpt.config import RecoverConfig
from slimgpt.files import write_atomically
from slimgpt.recovery.distillation import mean_kl
from slimgpt.recovery.rows import UNSCORED, Row
from slimgpt.recovery.student import take_as_written

EVALUATIONS = 8  # of the held-out text at most, and 8 steps apart; each is also where an interrupted run goes on
LORA_LOGIT_BYTES = 1 << 30
WARMUP = 0.05  # share of the steps
STATE = "trainer_state.json"  # Trainer's name for it
WRITTEN = "written.json"  # of a state: its files' sizes, and the seconds spent until then; written last
OnStep = Callable[[int, int, dict[str, float]], None]


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the KL of a frozen teacher to the model that is trained."""

    loss_is_scaled_for_ga = False  # the mean over its own tokens: Trainer divides by the batches of a step

    def __init__(self, *, teacher: Any, student_head: OutputHead, teacher_head: OutputHead, **arguments: Any):
        super().__init__(**arguments)
        self.teacher = teacher.to(self.args.device)
        self.heads = student_head, teacher_head
        self._held_out: dict[bytes, Tensor] = {}  # what the teacher makes of it: it is read many times
        self.model.get_decoder().norm.register_forward_hook(self._remember)
        self._normed_BTD: Tensor | None = None

    def _remember(self, _: Any, __: Any, normed_BTD: Tensor) -> None:
        self._normed_BTD = normed_BTD

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Nats per token. The model itself computes the logits of one position alone; the heads take all, in parts."""
        target_BTE = self._target(inputs) if model.training else self._held_out_target(inputs)
        model(**inputs, use_cache=False, logits_to_keep=1)
        assert self._normed_BTD is not None, "the model's forward pass goes through its last norm"
        student_BTD, self._normed_BTD = self._normed_BTD, None
        return mean_kl(student_BTD, target_BTE, *self.heads)

    @torch.no_grad()
    def _target(self, inputs: dict[str, Tensor]) -> Tensor:
        states_BTE: Tensor = self.teacher.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return states_BTE

    def _held_out_target(self, inputs: dict[str, Tensor]) -> Tensor:
        text = inputs["input_ids"].cpu().numpy().tobytes()
        if text not in self._held_out:
            self._held_out[text] = self._target(inputs)
        return self._held_out[text]

    def prediction_step(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        """The loss alone: nothing is gathered over the vocabulary."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None


class _Watching(TrainerCallback):
    """Tells what Trainer logs, marks what it saves, and stops a training whose loss is none."""

    def __init__(self, on_step: OnStep | None, spent: Callable[[], float]):
        self.on_step, self.spent = on_step, spent

    def on_save(self, arguments: Any, state: Any, *_: Any, **__: Any) -> None:
        """Mark what was saved as complete: after all of it is on the disk."""
        path = Path(arguments.output_dir) / f"checkpoint-{state.global_step}"
        if arguments.should_save and path.is_dir():
            for file in path.iterdir():
                with file.open("rb") as saved:
                    os.fsync(saved.fileno())
            write_atomically(path / WRITTEN, json.dumps({"seconds": self.spent(), "sizes": _sizes(path)}))

    def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, float], **___: Any) -> None:
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(
                    f"the loss is {logs[name]} at step {state.global_step} of {state.max_steps}; lower learning_rate"
                )
        if self.on_step and "train_runtime" not in logs:  # the totals in the end
            self.on_step(state.global_step, state.max_steps, logs)


def steps_between(steps: int) -> int:
    """Steps from one evaluation of the held-out text to the next."""
    return min(steps, max(EVALUATIONS, -(-steps // EVALUATIONS)))


def arguments_for(
    config: RecoverConfig, steps: int, folder: Path, device: torch.device, dtype: torch.dtype, vocab_size: int
) -> TrainingArguments:
    """Trainer's arguments: AdamW without weight decay, a cosine, the held-out text every so many steps.

    Args:
        config: filled.
        steps: of the optimizer.
        folder: for the states.
        device: of this process.
        dtype: of the products.
        vocab_size: of the model.

    Raises:
        ValueError: where a step's sequences cannot be shared out among the processes.
    """
    every = steps_between(steps)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(WARMUP * steps)),
        weight_decay=0.0,
        adam_beta2=0.95,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        seed=config.seed,
        train_sampling_strategy="sequential",  # they were drawn in random order
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,  # and the best one
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would copy the model to all GPUs of one process
    if config.batch_size % arguments.world_size:
        raise ValueError(
            f"batch_size is {config.batch_size}, which {arguments.world_size} processes cannot share equally; make it "
            "a multiple of their number"
        )
    own, most = config.batch_size // arguments.world_size, config.block_tokens
    if config.method == "lora":  # the model itself makes the logits of all tokens
        most = min(most, LORA_LOGIT_BYTES // (4 * vocab_size))
    fitting = [n for n in range(1, own + 1) if own % n == 0 and n * config.seq_len <= most]
    together = max(fitting, default=1)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = together
    arguments.gradient_accumulation_steps = own // together
    return arguments


def padded(rows: list[Row]) -> dict[str, Tensor]:
    """Sequences of several lengths as one batch ``[B, T]``, the rest masked and unscored."""
    masks = [torch.ones_like(row["input_ids"]) for row in rows]
    return {
        "input_ids": pad_sequence([row["input_ids"] for row in rows], batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=UNSCORED),
    }


def newest(folder: Path) -> Path | None:
    """The last complete state of an interrupted training; None where there is none.

    A state names the best one by its absolute path, which is put right where the folder was moved.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    if state := next((path for path in found if _whole(path)), None):
        _put_right(state)
    return state


def _whole(path: Path) -> bool:
    try:
        best = json.loads((path / STATE).read_text())["best_model_checkpoint"]
        sizes = json.loads((path / WRITTEN).read_text())["sizes"]
    except (OSError, ValueError, KeyError):
        return False
    return sizes == _sizes(path) and (not best or path.with_name(Path(best).name).is_dir())


def _put_right(path: Path) -> None:
    state, written = (json.loads((path / name).read_text()) for name in (STATE, WRITTEN))
    best = state["best_model_checkpoint"]
    if best and (here := path.with_name(Path(best).name)) != Path(best):
        write_atomically(path / STATE, json.dumps({**state, "best_model_checkpoint": str(here)}, indent=2))
        write_atomically(path / WRITTEN, json.dumps({**written, "sizes": _sizes(path)}))


def _sizes(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in path.iterdir() if file.name != WRITTEN}


def seconds_until(state: Path) -> float:
    """What the work took that ``state`` holds, by all processes that did some of it."""
    return float(json.loads((state / WRITTEN).read_text())["seconds"])


def train(
    trainer: Trainer, state: Path | None, on_step: OnStep | None, spent: Callable[[], float]
) -> list[list[float]]:
    """Train, from where an earlier run stopped; the best state is in the model then.

    Args:
        trainer: not used yet.
        state: where it goes on; None for the beginning.
        on_step: as of ``recover``.
        spent: seconds until now, those of earlier processes included.

    Raises:
        ValueError: where the loss is no number, or the device's memory does not hold the training.

    Returns:
        Step and loss of the held-out text, each time that it was read; first the model as it came.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watching(on_step, spent))
    with ExitStack() as held:
        if hasattr(trainer.model, "peft_config"):
            from peft.helpers import disable_input_dtype_casting

            held.enter_context(disable_input_dtype_casting(trainer.model))  # to float32: autocast casts back
        try:
            trainer.train(resume_from_checkpoint=str(state) if state else None)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the device has too little memory ({str(error).split('. ')[0]}); lower block_tokens, or train lora"
            ) from error
    # A run that goes on reads the held-out text at its start once more.
    curve = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    return [[step, loss] for step, loss in curve.items()]


def measure_as_written(trainer: Trainer, stored: Callable[[str], Tensor]) -> float:
    """The held-out loss of the weights as they are written, which the model has from then on.

    Args:
        trainer: after its training.
        stored: a tensor of the checkpoint that was trained, by its name.
    """
    take_as_written(trainer.model, stored)
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, _Watching)]
    with trainer.model.disable_adapter() if hasattr(trainer.model, "peft_config") else nullcontext():
        return float(trainer.evaluate()["eval_loss"])
