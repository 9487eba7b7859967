"""``slimgpt recover``."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from flows.cli.finding import find
from flows.cli.flags import config_from, flags, given
from slimgpt.config import RecoverConfig

_all: Any = Parameter(name="*")
RecoverFlags = flags("RecoverFlags", RecoverConfig(), group="Recovery")


def recover(
    model: str,
    out: Path,
    *,
    revision: str = "",
    dry_run: bool = False,
    options: Annotated[RecoverFlags, _all] = RecoverFlags(),
) -> None:
    """Train the pruned MODEL into the folder OUT, to predict what the dense one predicts. Run it again to resume.

    On several GPUs, or CPUs: torchrun --nproc-per-node=N -m slimgpt recover MODEL OUT ...

    Args:
        model: A pruned model: a folder, a hub id, models:/NAME@alias or runs:/RUN_ID.
        out: A new folder for the recovered model.
        revision: Commit or tag on the hub; empty for the newest.
        dry_run: Say what would happen, and what is missing, and stop.
    """
    config = config_from(RecoverConfig(), given(options))
    from flows.cli.interrupts import listening

    with listening() as interrupts:
        from slimgpt.engine.ranks import joined

        interrupts.unit, interrupts.kept = (
            "step",
            "the states of the training are kept: run the same command again to resume",
        )
        with joined(config.device) as ranks:
            interrupts.alone = ranks.count == 1
            for turn in (True, False):  # the first process fetches, the others find what it fetched
                with ranks.together():
                    if ranks.first is turn:
                        folder = find(model, revision)
                        teacher = find(config.teacher, "") if config.teacher else None
            if not dry_run:
                _recover(folder, out, config, teacher, ranks, interrupts)
            elif ranks.first:
                _plan(folder, out, config, teacher)


def _plan(folder: Path, out: Path, config: Any, teacher: Path | None) -> None:
    from flows.cli import show
    from slimgpt.recovery.plan import plan

    planned = plan(folder, config, out, teacher=teacher)
    show.recovery_plan(planned)
    if planned.missing:
        raise ValueError("; ".join(planned.missing))


def _recover(folder: Path, out: Path, config: Any, teacher: Path | None, ranks: Any, interrupts: Any) -> None:
    from flows.cli import show
    from slimgpt.recovery.recoverer import recover as run

    with _progress(interrupts) as on_step:
        made = run(folder, out, config, teacher=teacher, on_step=on_step)
    if ranks.first:
        show.line(made.lineage.steps[-1].summary)
        show.line(f"written to    {out}")


@contextmanager
def _progress(interrupts: Any) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """A bar on stderr that moves with each step; made with the first one: a refusal before it shows no bar."""
    from tqdm import tqdm

    bars: list[Any] = []
    shown: dict[str, str] = {}

    def on_step(step: int, steps: int, measured: dict[str, float]) -> None:
        if not bars:
            bars.append(tqdm(total=steps, initial=step, unit="step", desc="recover", file=sys.stderr))
        shown.update({name: f"{measured[key]:.4f}" for name, key in _MEASURED.items() if key in measured})
        bars[0].set_postfix(shown, refresh=False)
        bars[0].update(step - bars[0].n)
        interrupts.unit_done(step, steps)

    try:
        yield on_step
    finally:
        for bar in bars:
            bar.close()


_MEASURED = {"loss": "loss", "held out": "eval_loss"}
