"""Prune a model into a folder, layer by layer; or measure the widths that this would give, and write nothing.

slimgpt prune smollm2 out --ratio 0.25 --num-samples 32 --seq-len 1024        (about 2 minutes on 2 CPU cores)
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from slimgpt.checkpoints.lineage import Checkpoint, prune_step
from slimgpt.checkpoints.pruned_form import pruned_config
from slimgpt.checkpoints.stage_folder import refuse_other_folder
from slimgpt.config import PruneConfig
from slimgpt.data.calibration import Calibration
from slimgpt.device import device_name, dtype_name
from slimgpt.engine.chosen import Chosen
from slimgpt.engine.job import Job
from slimgpt.engine.journal import JOURNAL
from slimgpt.engine.output_folder import COMMAND, OutputFolder
from slimgpt.engine.prices import priced
from slimgpt.engine.ranks import Ranks
from slimgpt.engine.walk import Walk
from slimgpt.files import locked
from slimgpt.method.allocation import TOLERANCE, Allocation
from slimgpt.method.latency import LatencyTable
from slimgpt.method.shapes import LayerShape
from slimgpt.report import LayerReport, PruneReport
from slimgpt.usage import peak_memory

logger = logging.getLogger(__name__)


def prune(
    model: str | Path,
    out: str | Path,
    config: PruneConfig,
    *,
    calibration: Calibration | None = None,
    latency: LatencyTable | None = None,
    on_layer: Callable[[LayerReport, int], None] | None = None,
    on_priced: Callable[[int, int], None] | None = None,
) -> PruneReport:
    """Prune the model in folder ``model`` into the new folder ``out``, never holding more than one decoder layer.

    A run that was interrupted goes on where it stopped when it is started again with the same arguments; the result is
    the same, bit for bit. Called by every process of an initialised ``torch.distributed`` group (on GPUs after
    ``torch.cuda.set_device``), it shares the calibration sequences out among them; the first process writes.

    Args:
        model: dense (or already pruned) checkpoint with safetensors.
        out: where the pruned checkpoint goes.
        config: how it is pruned.
        calibration: token ids to use instead of those that ``config.calibration`` names.
        latency: what heads and channels take in an engine, which a ``target_speedup`` spends.
        on_layer: called after each layer, on every process, with its report and the number of layers; on a GPU its file
            is written meanwhile.
        on_priced: called after each layer that gets its prices, before any is pruned, on every process, with how many
            have them and the number of layers; not where they are in the cache.

    Raises:
        ValueError: for a model or a config that cannot be pruned, before long work; NaN in a layer, with its name.
        FileExistsError: when ``out`` holds something else, or a run that differs; the message names what differs.
        BlockingIOError: when another process writes to ``out``.
        ConnectionError: when another process of the group is gone.
        OSError: when the disk is too small.
    """
    ranks, out = Ranks(), Path(out)
    with ranks.together():
        job = Job(Path(model), config, latency=latency)
    folder: OutputFolder | None = None  # the first rank's alone
    with ExitStack() as held, torch.inference_mode():

        def begin() -> tuple[Calibration, PruneReport | None]:
            nonlocal folder
            refuse_other_folder(out, JOURNAL, COMMAND)
            job.check_space(out)
            source = Checkpoint.open(job.model)
            tokens = calibration or job.calibration()
            if len(tokens.ids_NT) < ranks.count:
                raise ValueError(
                    f"{len(tokens.ids_NT)} calibration sequences cannot be split among {ranks.count} "
                    f"processes; ask for at least {ranks.count} (num_samples), or start fewer processes"
                )
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out))
            folder = OutputFolder(out, job, source, tokens, ranks.count)
            return tokens, folder.report() if folder.finished else None

        tokens, report = ranks.from_first(begin)
        if report is not None:
            return report
        start = time.perf_counter()
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(job.device)
        allocation = _allocation(job, tokens, ranks, out, on_priced)
        if isinstance(allocation, Chosen):
            ranks.from_first(lambda: folder.follow(allocation.plan()) if folder else None)
        walk = Walk(job, tokens, allocation, out, folder, ranks)
        layers = walk.layers(on_layer)
        usage = ranks.gather((peak_memory(job.device), walk.clock.seconds()))
        return ranks.from_first(lambda: _publish(walk, layers, time.perf_counter() - start, usage))


def measured_widths(
    job: Job,
    calibration: Calibration,
    on_layer: Callable[[LayerReport, int], None] | None = None,
    on_priced: Callable[[int, int], None] | None = None,
) -> list[LayerShape]:
    """The widths that ``prune`` gives; writes nothing.

    Prices decide all of them; other schedules decide on the way, so that the layers are walked as ``prune`` does.

    Raises:
        ValueError: NaN in a layer, with its name.
    """
    with torch.inference_mode():
        ranks = Ranks()
        allocation = _allocation(job, calibration, ranks, None, on_priced)
        if isinstance(allocation, Chosen):
            return allocation.planned
        layers = Walk(job, calibration, allocation, None, None, ranks).layers(on_layer)
        return [layer.shape_of(shape) for layer, shape in zip(layers, job.shapes, strict=True)]


def _allocation(
    job: Job, calibration: Calibration, ranks: Ranks, out: Path | None, on_priced: Callable[[int, int], None] | None
) -> Allocation | Chosen:
    """What says how many units go where: on the way, or chosen before by prices."""
    if job.config.schedule != "nats":
        return job.allocation()
    prices = priced(job, calibration, ranks, out, on_priced)
    return ranks.from_first(lambda: Chosen(prices, job.config, job.shapes, job.speed))


def _publish(
    walk: Walk, layers: list[LayerReport], seconds: float, usage: list[tuple[int, dict[str, float]]]
) -> PruneReport:
    """Turn OUT into a model. ``usage`` holds peak memory and seconds by phase of each rank."""
    job, folder = walk.job, walk.folder
    assert folder is not None, "only the first rank publishes"
    shapes = [layer.shape_of(shape) for layer, shape in zip(layers, job.shapes, strict=True)]
    with walk.clock("write"):
        folder.finish_rest()
    usage = [(peak_memory(job.device), walk.clock.seconds()), *usage[1:]]
    before, after = job.parameters(job.shapes), job.parameters(shapes)
    projections = sum(shape.parameters for shape in job.shapes), sum(shape.parameters for shape in shapes)
    config = replace(job.config, dtype=dtype_name(job.dtype))
    if job.speed:  # its ratio was an estimate
        config = replace(config, ratio=PruneConfig().ratio, target_speedup=job.speed.speedup)
    phases = {name: max(of_rank.get(name, 0.0) for _, of_rank in usage) for name in usage[0][1]}
    report = PruneReport(
        base_model=job.base_model,
        model_type=job.model_config.model_type,
        config=config.to_dict(),
        calibration=walk.calibration.facts,
        layers=layers,
        ratio=(before - after) / projections[0],
        model_ratio=(before - after) / before,
        parameters_before=before,
        parameters_after=after,
        bytes_before=job.shards.bytes,
        bytes_after=folder.bytes,
        seconds=seconds,
        peak_memory_bytes=max(peak for peak, _ in usage),
        device=device_name(job.device),
        ranks=walk.ranks.count,
        activations=walk.place,
        layers_kept=sum(map(walk.setting.keeps, job.shapes)),
        replayed_layers=walk.replayed,
        seconds_by_phase=phases,
        requested=job.requested,
        predicted_speedup=job.speed.table.speedup(shapes) if job.speed else 0.0,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    if not job.speed and abs(report.ratio - job.config.ratio) > TOLERANCE:
        logger.warning(
            "%.2f%% of the projections' parameters were removed, %.2f%% were requested: widths are whole heads and "
            "multiples of ffn_multiple, which is %d; a lower one comes closer",
            100 * report.ratio,
            100 * job.config.ratio,
            job.config.ffn_multiple,
        )
    step = prune_step(report, projections, folder.source.digest)
    folder.publish(pruned_config(job.model_config, job.family, shapes), report, step)
    return report
