"""Run a table of the paper: every run with its own config, measured, and written beside the paper's figures.

slimgpt reproduce llama-7b --model FOLDER            # what the paper did; docs/reproduction.md has the result
slimgpt reproduce ablations --model smollm2 --samples-share 0.0625 --max-blocks 96 --measures perplexity
"""

import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from deploy.serving.server import ServerError
from flows.defaults import BENCH, EVALUATION
from flows.paper.attempts import Attempt, ReproduceConfig, attempts_of, still_to_do, wanted_of
from flows.paper.measured import Measured, add_measured, read_measured
from flows.paper.page import write_page
from flows.paper.protocol import read_table
from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.checkpoints.origins import read_config
from slimgpt.checkpoints.weight_files import count_parameters
from slimgpt.device import compute_dtype, device_name, dtype_name, resolve_device
from slimgpt.files import check_writable
from tasks.environment import RunFolder, Workspace, prepare
from tasks.preflight.chain import Chain, plan_chain
from tasks.preflight.disk import check_disk
from tasks.preflight.measurable import check_measurable
from tasks.preflight.models import ResolvedModel, resolve
from tasks.preflight.request import Preflight, check_request
from tasks.registry.config import RegistryConfig
from tasks.registry.live_run import LiveRun, open_run
from tasks.registry.run_content import commit
from tasks.registry.runs import parameters_of
from tasks.steps.benchmarking import benchmark
from tasks.steps.chain import run_chain
from tasks.steps.evaluation import EvalRequest, evaluate_model
from tasks.steps.pruning import PruneStage
from tasks.steps.recovery import RecoverStage

PAGE = "docs/reproduction.md"
REGISTRY = RegistryConfig(experiment="reproduction", weights="reference")  # figures alone: no model is registered
_PACKAGES = ("lm_eval", "torch", "transformers")


@flow(name="reproduce", persist_result=False)
def reproduce(
    table: str,
    model: str = "",
    config: ReproduceConfig = ReproduceConfig(),  # noqa: B008  frozen
    page: str = PAGE,
    runs: str = "",
) -> list[Measured]:
    """Run what a table of the paper has, and write its figures beside the paper's.

    What an interrupted call has measured is not measured again.

    Args:
        table: Name of a folder in flows/paper.
        model: The paper's model, or another one: a folder, a hub id, smollm2; empty for the paper's from the hub.
        config: Which runs, and how much of the paper's protocol.
        page: Markdown file that is written; the figures lie beside it, as .json.
        runs: Folder for the files of all runs; empty for ./runs or SLIMGPT_RUNS.

    Raises:
        ValueError, OSError: for what cannot work, before the first run.
    """
    if Path(page).suffix != ".md":
        raise ValueError(f"page is {page!r}; it must be a Markdown file, such as {PAGE}")
    for file in (Path(page), Path(page).with_suffix(".json")):
        if file.is_dir():
            raise ValueError(f"page is {page!r}, and {file} is a folder; give another name")
    workspace, wanted, figures = prepare(runs), read_table(table), Path(page).with_suffix(".json")
    check_writable(Path(page).absolute().parent)
    dense = resolve(model or wanted.model, "", workspace)
    attempts = attempts_of(wanted, config, count_parameters(dense.folder))
    source = dense.label, dense.checkpoint.digest[:12], *config.protocol
    attempts = still_to_do(attempts, read_measured(figures), source)
    ready = check_measures(attempts, dense, workspace)
    planned = [plan_run(attempt, ready, dense, workspace) for attempt in attempts]
    check_room(planned, config, workspace)
    for one in planned:
        measured = run_attempt.with_options(flow_run_name=one.attempt.title)(one, dense, config, workspace)
        write_page(Path(page), add_measured(figures, measured))
    write_page(Path(page), known := read_measured(figures))
    return [one for one in known if one.table == table and one.source == source]


@dataclass(frozen=True)
class Ready:
    """What is measured can be measured.

    Args:
        evaluations: what each evaluation reads, by its name.
        serving: where speed is measured: that vLLM serves here.
    """

    evaluations: dict[str, Preflight]
    serving: Preflight | None


@dataclass(frozen=True)
class PlannedRun:
    """A run that has passed its checks.

    Args:
        attempt: what is run.
        chain: its stages; None for the dense model.
        folder: of its files.
        ready: for what is measured.
    """

    attempt: Attempt
    chain: Chain | None
    folder: RunFolder
    ready: Ready


def check_measures(attempts: list[Attempt], dense: ResolvedModel, workspace: Workspace) -> Ready:
    """Refuse what cannot be measured of any run; all runs of a table are measured alike.

    Raises:
        ValueError, OSError: one line with the remedy.
    """
    evaluations, serving = {}, None
    for name, evaluation in (attempts[0].evaluations if attempts else {}).items():
        request = check_request("reproduction", evaluation, workspace, ("benchmark",))
        evaluations[name] = check_measurable(dense.folder, evaluation, BENCH, request)
    if bench := next((attempt.bench for attempt in attempts if attempt.bench), None):
        serving = check_request("reproduction", EVALUATION, workspace, ("evaluate",))
        serving = check_measurable(dense.folder, EVALUATION, bench, serving)
        if serving.serving_obstacle:
            raise ValueError(f"speed is measured, which needs vLLM: {serving.serving_obstacle}")
    return Ready(evaluations, serving)


def plan_run(attempt: Attempt, ready: Ready, dense: ResolvedModel, workspace: Workspace) -> PlannedRun:
    """Check the stages.

    Raises:
        ValueError: one line with the remedy.
    """
    stages: list[Any] = [PruneStage(attempt.prune)] if attempt.prune else []
    stages += [RecoverStage(attempt.recover)] if attempt.recover else []
    chain = plan_chain(dense, stages) if stages else None
    facts: dict[str, object] = chain.facts() if chain else {"model": dense.checkpoint.digest}
    return PlannedRun(attempt, chain, workspace.run("reproduction", facts), ready)


def check_room(planned: list[PlannedRun], config: ReproduceConfig, workspace: Workspace) -> None:
    """Refuse what the disk cannot hold: all models where they are kept, else those of the largest run.

    Raises:
        OSError: one line with the remedy.
    """
    places = [(one.chain, one.folder) for one in planned if one.chain is not None]
    if places and not config.keep_models:
        places = [max(places, key=lambda place: place[0].missing_bytes(place[1], "all"))]
    if places:
        check_disk(places, REGISTRY, workspace, "all")


@flow(name="run of the paper", persist_result=False, validate_parameters=False)
def run_attempt(
    planned: PlannedRun, dense: ResolvedModel, config: ReproduceConfig, workspace: Workspace
) -> list[Measured]:
    """Make the models of one run, measure each, and let them go."""
    attempt, chain, folder = planned.attempt, planned.chain, planned.folder
    parameters = parameters_of(table=attempt.table.name, run=attempt.run.name, model=dense.name, reproduce=config)
    parameters |= parameters_of(prune=attempt.prune, recover=attempt.recover)
    with open_run(attempt.title, parameters, REGISTRY, workspace, folder, flow="flows.reproduce") as run:
        models = [dense.checkpoint]
        if chain is not None:
            last = run_chain(chain, folder, "all", run)
            models = [*(Checkpoint.open(out) for out in chain.outs(folder)[:-1]), last]
        sides = zip(attempt.run.sides, models, strict=True)
        measured = [measure(planned, side, model, dense, config, run) for side, model in sides]
    if not config.keep_models:
        for out in (folder.model, folder.root / "stages"):
            shutil.rmtree(out, ignore_errors=True)
    return measured


def measure(
    planned: PlannedRun, side: str, model: Checkpoint, dense: ResolvedModel, config: ReproduceConfig, run: LiveRun
) -> Measured:
    """All figures of one model."""
    attempt, folder, device, metrics = planned.attempt, planned.folder, resolve_device(config.device), {}
    for name, evaluation in attempt.evaluations.items():
        request = EvalRequest(
            f"{side}-{name.replace('_', '-')}", model, evaluation, planned.ready.evaluations[name].data
        )
        metrics[name] = evaluate_model(request, folder, run).metrics
    counted = [one for one in attempt.measures if one.evaluation or one.mean]
    figures = {one.name: attempt.table.figure(one, metrics) for one in counted}
    figures["parameters"] = count_parameters(model.folder)
    if side == "pruned":
        cost = model.lineage.steps[-1].figures
        figures |= {"seconds": cost["seconds"], "memory": cost["peak_memory_bytes"] / 1e9}
        if attempt.bench and planned.ready.serving:
            bench = benchmark(dense.folder, model.folder, attempt.bench, planned.ready.serving, folder, run)
            if bench.report is None:
                raise ServerError(bench.skipped)
            figures["latency"] = bench.report.full.median("pruned", "mean_tpot_ms")
            figures["latency_dense"] = bench.report.full.median("dense", "mean_tpot_ms")
    figures = {name: figures[name] for name in wanted_of(attempt, side)}
    get_run_logger().info("%s: %s", side, ", ".join(f"{name} {value:.4g}" for name, value in sorted(figures.items())))
    return Measured(
        table=attempt.table.name,
        run=attempt.run.name,
        ratio=attempt.run.ratio,
        side=side,
        model=dense.label,
        digest=dense.checkpoint.digest[:12],
        own=attempt.own and config.complete,
        samples_share=config.samples_share,
        recovery_tokens=config.recovery_tokens,
        limit=config.limit,
        max_blocks=config.max_blocks,
        figures=figures,
        date=datetime.now(UTC).date().isoformat(),
        device=device_name(device),
        dtype=dtype_name(compute_dtype("auto", device, read_config(dense.folder).dtype)),
        commit=commit()[:8],
        versions={package: version(package) for package in _PACKAGES},
    )
