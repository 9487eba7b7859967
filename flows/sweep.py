"""Try several ratios, schedules and models, and register the best one within limits.

python -m flows.sweep                                  # the built-in model at three ratios
slimgpt sweep --models smollm2 --ratios 0.2,0.35,0.5 --schedules log,uniform --prefer size
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture, wait

from deploy.bench.config import BenchConfig
from deploy.report.files import Report
from flows.defaults import (
    BENCH,
    EVALUATION,
    PRUNE,
    RECOVER,
    REGISTRY,
    SWEEP,
    BenchSection,
    EvaluationSection,
    PruneSection,
    RecoverSection,
    RegistrySection,
    SweepSection,
    check_recovery,
)
from flows.prefect_api import reached
from slimgpt.config import EvalConfig
from slimgpt.evaluation.harness import EvalResult
from slimgpt.evaluation.harness_tasks import DataUsed
from tasks.environment import Workspace, prepare
from tasks.preflight.disk import check_disk
from tasks.preflight.forecast import Forecast, forecast
from tasks.preflight.measurable import check_measurable
from tasks.preflight.models import resolve, settled
from tasks.preflight.request import Preflight, check_request
from tasks.registry.config import RegistryConfig
from tasks.registry.live_run import LiveRun, open_run
from tasks.registry.names import RegisteredVersion, default_name
from tasks.registry.runs import RegistrationInput, parameters_of
from tasks.retrying import ON_NETWORK_FAULTS
from tasks.steps.benchmarking import Benchmark, benchmark
from tasks.steps.bundling import package
from tasks.steps.evaluation import keep_evaluation
from tasks.steps.reporting import write_report
from tasks.sweep.comparing import Outcome, compare_models
from tasks.sweep.points import Point, Tried, check_judgeable, grid_of
from tasks.sweep.recording import record_sweep
from tasks.sweep.runners import own_environment, runner_of
from tasks.sweep.trying import try_dense, try_point


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves: its table, its files, and the registered version."""

    outcome: Outcome
    folder: Path
    version: RegisteredVersion


@flow(name="sweep", persist_result=False)
def sweep(
    models: tuple[str, ...] = ("smollm2",),
    name: str = "",
    grid: SweepSection = SWEEP,
    prune: PruneSection = PRUNE,
    recover: RecoverSection = RECOVER,
    evaluation: EvaluationSection = EVALUATION,
    bench: BenchSection = BENCH,
    registry: RegistrySection = REGISTRY,
    runs: str = "",
    dry_run: bool = False,
) -> Swept | Forecast:
    """Prune models at several ratios and schedules, measure all, and register the best within limits.

    Args:
        models: Dense models: folders, hub ids, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        name: Name in the registry; empty for the chosen model's own and -slim.
        grid: Ratios, schedules, limits, and what the models are pruned on.
        prune: How the models are pruned; ratio and schedule are the grid's.
        recover: How each pruned model is trained again; no tokens: not at all.
        evaluation: What is measured of all models.
        bench: The load that each model is measured under, against its dense one.
        registry: Where it goes in MLflow, and whether the weights go along.
        runs: Folder for the files of all runs; empty for ./runs or SLIMGPT_RUNS.
        dry_run: Check everything, say what each point would take, and stop.

    Raises:
        ValueError: when no model is within the limits, after all of them were recorded; each one's reason.
    """
    if not models:
        raise ValueError("models is empty; name at least one")
    workspace = prepare(runs)
    ready = check_request(name or default_name(models[0]), evaluation, workspace, experiment=registry.experiment)
    if not grid.measure_speed:
        ready = replace(ready, serving_obstacle="it was not requested; set measure_speed")
    resolved = [resolve(named, "", workspace) for named in models]
    for model in resolved:
        ready = check_measurable(model.folder, evaluation, bench, ready)
    check_judgeable(grid, evaluation, ready.serving_obstacle)
    check_recovery(recover)
    teacher = resolve(recover.teacher, "", workspace).folder if recover.teacher and recover.tokens else None
    points = grid_of(resolved, grid, prune, recover, teacher)
    check_disk([(point.chain, point.folder(workspace)) for point in points], registry, workspace)
    if dry_run:
        return forecast({point.title: (point.chain, point.folder(workspace)) for point in points})
    runner = runner_of(grid)
    settings = {"grid": grid, "prune": prune, "recover": recover, "evaluation": evaluation, "bench": bench}
    parameters = parameters_of(models=list(models), **settings)
    folder = workspace.run("sweeps", parameters)
    with open_run(name or "sweep", parameters, registry, workspace, folder, flow="flows.sweep") as run:
        children = [run.child(point.title, _parameters(point, evaluation, bench), "flows.sweep") for point in points]
        with own_environment():
            dense, tried = try_all.with_options(task_runner=runner)(points, evaluation, ready.data, workspace, children)
        measured = [_measure(one, dense[one.point.model], bench, ready, evaluation) for one in tried]  # one at a time
        outcome = compare_models(tried, [one.report.comparison for one in measured], grid, folder.root)
        if outcome.chosen is not None:
            best = next(i for i, one in enumerate(tried) if one.point.title == outcome.chosen.title)
            measured[best] = _ready_to_serve(
                measured[best], name or default_name(tried[best].point.dense.label), registry
            )
        inputs = {one.one.point.title: _registration(one, registry) for one in measured}
        record = record_sweep.with_options(**ON_NETWORK_FAULTS)
        version = record(outcome, tried, inputs, folder.root, run)
    if version is None:
        raise ValueError(f"no model is within the limits, so none is registered: {outcome.refused}")
    return Swept(outcome, folder.root, version)


@flow(name="prune and evaluate", persist_result=False, validate_parameters=False)
def try_all(
    points: list[Point],
    evaluation: EvalConfig,
    data: tuple[DataUsed, ...],
    workspace: Workspace,
    runs: list[LiveRun],
) -> tuple[dict[str, EvalResult], list[Tried]]:
    """Every dense model's evaluation by its name, and every point pruned and evaluated, on this flow's task runner.

    Each point's figures go to its MLflow run.

    Raises:
        ValueError: when some failed, after the others have ended: those are not pruned again by another run.
        RuntimeError: the same, where the fault is none of the input's or the machine's.
    """
    models = {point.model: point.dense for point in points}
    dense = {model: try_dense.submit(folder, evaluation, data, workspace) for model, folder in models.items()}
    each = zip(points, runs, strict=True)
    tried = [try_point.submit(point, evaluation, data, workspace, run) for point, run in each]
    futures: list[PrefectFuture[Any]] = [*dense.values(), *tried]
    wait(futures)
    titles = [*dense, *(point.title for point in points)]
    failed = [(title, future) for title, future in zip(titles, futures, strict=True) if not future.state.is_completed()]
    if failed:
        causes = [future.result(raise_on_failure=False) for _, future in failed]
        foreseen = all(isinstance(cause, ValueError | OSError) for cause in causes)  # the user's to mend: no traceback
        raise (ValueError if foreseen else RuntimeError)(
            f"{len(failed)} of {len(titles)} failed; run it again, and finished models are reused: "
            + "; ".join(f"{title}: {future.state.message}" for title, future in failed)
        )
    return {model: future.result() for model, future in dense.items()}, [future.result() for future in tried]


@dataclass(frozen=True)
class _Measured:
    """A model with all its figures; ``model`` is the folder that would be registered."""

    one: Tried
    dense: EvalResult
    speed: Benchmark
    parameters: dict[str, Any]
    report: Report
    model: Path


def _measure(one: Tried, dense: EvalResult, bench: BenchConfig, ready: Preflight, evaluation: EvalConfig) -> _Measured:
    """Throughput and latency, alone on the machine, and the report."""
    point, folder = one.point, one.folder
    keep_evaluation("dense", dense, folder)
    with one.run.working():
        one.run.log_evaluation("dense", dense)
        speed = benchmark(point.dense.folder, one.pruned.folder, bench, ready, folder, one.run)
    parameters = _parameters(point, evaluation, bench)
    report = write_report(
        *(point.title, one.pruned.lineage, point.dense.checkpoint.digest, dense, one.evaluation),
        *(speed, parameters, folder),
        registered=False,
    )
    return _Measured(one, dense, speed, parameters, report, one.pruned.folder)


def _parameters(point: Point, evaluation: EvalConfig, bench: BenchConfig) -> dict[str, Any]:
    model = point.dense.folder
    settings = {"prune": settled(point.config, model), "evaluation": settled(evaluation, model)}
    settings |= {"recover": point.recover, "bench": bench}
    return parameters_of(model=point.dense.name, **settings)


def _ready_to_serve(measured: _Measured, name: str, registry: RegistryConfig) -> _Measured:
    """The chosen model, packaged, and its report under the name that it is registered by."""
    one = measured.one
    bundle = package(one.pruned, measured.dense, one.evaluation, name, one.folder, registry)
    figures = (one.pruned.lineage, one.point.dense.checkpoint.digest, measured.dense, one.evaluation, measured.speed)
    return replace(measured, model=bundle.model, report=write_report(name, *figures, measured.parameters, one.folder))


def _registration(measured: _Measured, registry: RegistryConfig) -> RegistrationInput:
    one = measured.one
    return RegistrationInput(
        measured.model,
        measured.parameters,
        measured.dense,
        one.evaluation,
        measured.report,
        one.folder,
        registry,
    )


if __name__ == "__main__":
    with reached():
        sweep()
