"""``slimgpt``: prune, recover, inspect, eval, compress, sweep, promote, ... Flags come from the configs.

A user's mistake ends in one line and exit code 2.
What a sub-command needs is imported when it runs: ``--help`` responds at once.
"""

import io
import logging
import os
import sys
import time
from typing import NoReturn

from cyclopts import App, CycloptsError

from flows.cli import exporting, pruning, quantizing, recovering, registering, reproducing, serving, sweeping
from slimgpt import __version__

USER_ERROR = 2
app = App(
    name="slimgpt",
    help="Structured pruning of LLaMA-family models: prune, recover, measure, register, serve.",
    version=__version__,
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # main() says what is kept
)

for command in (
    *(pruning.prune, recovering.recover, quantizing.quantize, pruning.inspect, registering.compress, sweeping.sweep),
    *(registering.promote, registering.rollback),
    *(serving.serve, serving.bench, serving.latency, serving.package),
    *(exporting.export, reproducing.reproduce),
):
    app.command(command)
app.command(pruning.evaluate, name="eval")


def _says_more_than_completed(record: logging.LogRecord) -> bool:
    """Leaves out Prefect's line per finished task, which names no task; failures and caches are still shown."""
    return record.getMessage() != "Finished in state Completed()"


def _fail(message: str, code: int = USER_ERROR) -> NoReturn:
    if _launched() and os.environ["RANK"] != "0":
        # What ends one process ends all, and the first says it. torchrun ends the others as soon as one has ended, so
        # this one waits for that: it must not be the first to go.
        time.sleep(2)
        raise SystemExit(code)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _launched() -> bool:
    """Whether torchrun started this process (as slimgpt.engine.ranks.launched, without importing torch)."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def main() -> None:
    """Run the command line. A user's mistake ends in one line and exit code 2, a fault of ours in a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a work that is done does not end in an error for a character
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for ours in ("slimgpt", "deploy"):  # raised damping, a server that takes its time: worth a line
        logging.getLogger(ours).setLevel(logging.INFO)
    for runs in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(runs).addFilter(_says_more_than_completed)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant: an object instead of a name
    try:
        if _launched() and sys.argv[1:2] not in (["prune"], ["recover"]):
            raise ValueError("torchrun works only with `slimgpt prune` and `recover`; run this command without it")
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(f"{error} (see slimgpt {' '.join(sys.argv[1:2])} --help)")
    except (ValueError, OSError) as error:
        if os.environ.get("SLIMGPT_TRACEBACK"):
            raise
        _fail(str(error) or type(error).__name__)
    except KeyboardInterrupt as stop:
        _fail(str(stop.args[0]) if stop.args else "interrupted", getattr(stop, "code", 130))
