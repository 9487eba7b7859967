"""``slimgpt sweep``."""

import shlex
from typing import Annotated, Any

from cyclopts import Parameter

from flows.cli.finding import check_type, check_types, flow_parameters
from flows.cli.flags import flags, several
from flows.cli.registering import CompressBench, CompressEval, CompressRecover, CompressRegistry
from flows.defaults import BENCH, EVALUATION, PRUNE, RECOVER, REGISTRY, SWEEP

_all: Any = Parameter(name="*")
_OF_THE_GRID = ("ratio", "target_size", "target_parameters", "target_speedup", "schedule", "layer_ratios")
SweepPrune = flags("SweepPrune", PRUNE, group="Pruning", leave_out=_OF_THE_GRID)
SweepFlags = flags("SweepFlags", SWEEP, group="Sweep")


def sweep(
    *,
    config: str = "",
    models: str | None = None,
    name: str | None = None,
    runs: str | None = None,
    dry_run: bool = False,
    grid: Annotated[SweepFlags, _all] = SweepFlags(),
    prune: Annotated[SweepPrune, _all] = SweepPrune(),
    recover: Annotated[CompressRecover, _all] = CompressRecover(),
    evaluation: Annotated[CompressEval, _all] = CompressEval(),
    bench: Annotated[CompressBench, _all] = CompressBench(),
    registry: Annotated[CompressRegistry, _all] = CompressRegistry(),
) -> None:
    """Prune at several ratios and schedules, recover, measure all, and register the best, as one Prefect flow.

    Args:
        config: A YAML file of the flow's parameters (models, name, runs, and the sections grid, prune, recover,
            evaluation, bench and registry). Flags win.
        models: Dense models, several separated by commas; smollm2 (built in) by default.
        name: Name in the registry; the chosen model's own name and -slim by default.
        runs: Folder for the files of all runs; ./runs or SLIMGPT_RUNS by default.
        dry_run: Check everything, say what each point would take, and stop.
    """
    sections = {"grid": SWEEP, "prune": PRUNE, "recover": RECOVER}
    sections |= {"evaluation": EVALUATION, "bench": BENCH, "registry": REGISTRY}
    given_flags = {"grid": grid, "prune": prune, "recover": recover}
    given_flags |= {"evaluation": evaluation, "bench": bench, "registry": registry}
    plain = {"models": models, "name": name, "runs": runs}
    parameters = flow_parameters(config, sections, given_flags, plain)
    if "models" in parameters:
        parameters["models"] = several("models", parameters["models"], str)
    from tasks.environment import prepare

    check_type("runs", parameters.get("runs", ""), str)  # the flow, which has all types, needs prepare() first
    prepare(parameters.get("runs", ""))
    from deploy.report.pareto import HEADER
    from flows.cli import show
    from flows.prefect_api import reached
    from flows.sweep import sweep as flow
    from tasks.preflight.forecast import Forecast

    check_types(flow.fn, parameters)
    with reached():
        done = flow(**parameters, dry_run=dry_run)
    if isinstance(done, Forecast):
        show.forecast(done)
        return
    show.table("sweep", HEADER, done.outcome.rows)
    show.line(f"plots        {done.folder}")
    show.line(f"registered   {done.version.name} version {done.version.version}, alias {done.version.alias}")
    runs_flag = f" --runs {shlex.quote(str(parameters['runs']))}" if parameters.get("runs") else ""
    show.line(f"serve it     slimgpt serve {done.version.uri}{runs_flag}")
