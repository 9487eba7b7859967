"""Run a chain of stages. What an earlier run finished is used again, from the last finished stage on."""

import shutil
from dataclasses import replace
from pathlib import Path

from prefect import get_run_logger

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.report import LayerReport
from tasks.environment import RunFolder
from tasks.preflight.chain import Chain, Keep, Watch
from tasks.registry.live_run import LiveRun
from tasks.steps.making import is_intact


def run_chain(chain: Chain, folder: RunFolder, keep: Keep = "last", run: LiveRun | None = None) -> Checkpoint:
    """The checkpoint that the last stage makes.

    Args:
        chain: the stages.
        folder: of the run.
        keep: "all" keeps what the stages before the last one made, and makes again what is missing of it; "last"
            removes each when the next one is finished, and what an earlier run kept.
        run: the MLflow run that takes each layer's figures as it ends, and those of all stages in the end.
    """
    logger, outs = get_run_logger(), chain.outs(folder)
    source, start = chain.dense.checkpoint, 0
    # What a later stage left makes the earlier ones superfluous, unless they are to be kept.
    for done in range(len(outs), 1, -1) if keep == "last" else ():
        if (made := _finished(chain, outs[done - 1], done)) is not None:
            logger.info("stages 1 to %d of %d: an earlier run made the same model, and it is intact", done, len(outs))
            source, start = made, done
            _remove(outs[: done - 1])
            break
    for i in range(start, len(outs)):
        source = chain.stages[i].run(source, outs[i], chain.facts(i + 1), _logging(run, source, i + 1, len(outs)))
        if keep == "last":
            _remove(outs[:i])
    if run is not None:
        run.log_pruning(source.lineage.since(chain.dense.checkpoint.digest), source.lineage)
    return source


def _remove(outs: list[Path]) -> None:
    for out in outs:
        shutil.rmtree(out, ignore_errors=True)


def _logging(run: LiveRun | None, source: Checkpoint, stage: int, stages: int) -> Watch | None:
    """Log a training's figures, and a layer as the lineage will hold it: with its ratio against the first model."""
    if run is None:
        return None
    earlier, prefix = source.lineage.layers, "" if stage == stages else f"stage_{stage}/"

    def log(layer: LayerReport) -> None:
        kept = (1 - earlier[layer.layer].ratio if earlier else 1) * (1 - layer.ratio)
        run.log_layer(replace(layer, ratio=1 - kept), prefix)

    return Watch(log, lambda step, measured: run.log_training(step, measured, prefix))


def _finished(chain: Chain, out: Path, stages: int) -> Checkpoint | None:
    """What the first ``stages`` left in ``out``, where it is complete and as it was written."""
    if not is_intact(out):
        return None
    made = Checkpoint.open(out)
    expected = len(chain.dense.checkpoint.lineage.steps) + stages
    return made if len(made.lineage.steps) == expected else None
