"""Run a chain of stages. What an earlier run finished is used again, from the last finished stage on."""

import shutil
from pathlib import Path

from prefect import get_run_logger

from slimgpt.checkpoints.lineage import Checkpoint
from tasks.environment import RunFolder
from tasks.preflight.chain import Chain, Keep


def run_chain(chain: Chain, folder: RunFolder, keep: Keep = "last") -> Checkpoint:
    """The checkpoint that the last stage makes.

    Args:
        chain: the stages.
        folder: of the run.
        keep: "all" keeps what the stages before the last one made; "last" removes each when the next one is finished.
    """
    logger, outs = get_run_logger(), chain.outs(folder)
    source, start = chain.dense.checkpoint, 0
    for done in range(len(outs), 1, -1):  # what a later stage left makes the earlier ones superfluous
        if (made := _finished(chain, outs[done - 1], done)) is not None:
            logger.info("stages 1 to %d of %d: an earlier run made the same model, and it is intact", done, len(outs))
            source, start = made, done
            break
    for i in range(start, len(outs)):
        source = chain.stages[i].run(source, outs[i], chain.facts(i + 1))
        if keep == "last" and i > 0:
            shutil.rmtree(outs[i - 1], ignore_errors=True)
    return source


def _finished(chain: Chain, out: Path, stages: int) -> Checkpoint | None:
    """What the first ``stages`` left in ``out``, where it is complete and as it was written."""
    if not (out / "config.json").is_file():
        return None
    try:
        made = Checkpoint.open(out)
    except ValueError:  # damaged since
        return None
    expected = len(chain.dense.checkpoint.lineage.steps) + stages
    return made if len(made.lineage.steps) == expected else None
