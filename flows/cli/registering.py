"""``slimgpt compress | promote | rollback``."""

import shlex
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from flows.cli.finding import check_type, check_types, flow_parameters
from flows.cli.flags import WholeNumber, config_from, flags, given, read_config_file, several
from flows.defaults import BENCH, EVALUATION, PRUNE, QUANTIZE, RECOVER, REGISTRY
from tasks.registry.gates import GateConfig

_all: Any = Parameter(name="*")
CompressPrune = flags("CompressPrune", PRUNE, group="Pruning")
CompressRecover = flags("CompressRecover", RECOVER, group="Recovery", prefix="recover.")
CompressQuantize = flags("CompressQuantize", QUANTIZE, group="Quantisation", prefix="quantize.")
CompressEval = flags("CompressEval", EVALUATION, group="Evaluation", prefix="evaluation.")
CompressBench = flags("CompressBench", BENCH, group="Benchmark", prefix="bench.")
CompressRegistry = flags("CompressRegistry", REGISTRY, group="Registry", prefix="registry.")
GateFlags = flags("GateFlags", GateConfig(), group="Gates")


def compress(
    *,
    config: str = "",
    model: str | None = None,
    name: str | None = None,
    first_ratios: str | None = None,
    rounds: WholeNumber | None = None,
    keep: Literal["last", "all"] | None = None,
    skip: str | None = None,
    revision: str | None = None,
    runs: str | None = None,
    dry_run: bool = False,
    preset: Literal["best", "paper"] | None = None,
    prune: Annotated[CompressPrune, _all] = CompressPrune(),
    recover: Annotated[CompressRecover, _all] = CompressRecover(),
    quantize: Annotated[CompressQuantize, _all] = CompressQuantize(),
    evaluation: Annotated[CompressEval, _all] = CompressEval(),
    bench: Annotated[CompressBench, _all] = CompressBench(),
    registry: Annotated[CompressRegistry, _all] = CompressRegistry(),
) -> None:
    """Prune, recover, quantise, evaluate, package, benchmark, register and report, as one Prefect flow.

    Args:
        config: A YAML file of the flow's parameters (model, name, first_ratios, rounds, keep, skip, revision, runs,
            and the sections prune, recover, quantize, evaluation, bench and registry). Flags win.
        model: A folder, a GGUF file, a hub id, smollm2 (built in, the default), models:/NAME@alias or runs:/RUN_ID.
        name: Name in the registry; the model's own name and -slim by default.
        first_ratios: Prune in several steps: shares of the dense model's projection parameters that are gone after each
            step before the last, whose share is --ratio. Separate several by commas. Each step ends with a training
            where --recover.tokens is given.
        rounds: Prune, and train, in so many turns, whose ratios rise in equal steps to --ratio; 1 by default.
        keep: all keeps the models that the steps before the last one make; last, the default, removes them.
        skip: Stages to leave out: evaluate, benchmark or, separated by a comma, both.
        revision: Commit or tag on the hub.
        runs: Folder for the files of all runs; ./runs or SLIMGPT_RUNS by default.
        dry_run: Check everything, say what each stage would take, and stop.
        preset: Same presets as `slimgpt prune`; a config file and flags win.
    """
    sections = {"prune": PRUNE, "recover": RECOVER, "quantize": QUANTIZE, "evaluation": EVALUATION, "bench": BENCH}
    sections["registry"] = REGISTRY
    given_flags = {"prune": prune, "recover": recover, "quantize": quantize, "evaluation": evaluation, "bench": bench}
    given_flags["registry"] = registry
    plain = {"model": model, "name": name, "first_ratios": first_ratios, "rounds": rounds, "keep": keep, "skip": skip}
    plain |= {"revision": revision, "runs": runs}
    parameters = flow_parameters(config, sections, given_flags, plain, preset)
    for key, kind in (("first_ratios", float), ("skip", str)):
        if key in parameters:
            parameters[key] = several(key, parameters[key], kind)
    from tasks.environment import prepare

    check_type("runs", parameters.get("runs", ""), str)  # the flow, which has all types, needs prepare() first
    prepare(parameters.get("runs", ""))
    from deploy.report.comparison import HEADER, notes, rows
    from flows.cli import show
    from flows.compress import compress as flow
    from flows.prefect_api import reached
    from tasks.preflight.forecast import Forecast

    check_types(flow.fn, parameters)
    with reached():
        done = flow(**parameters, dry_run=dry_run)
    if isinstance(done, Forecast):
        show.forecast(done)
        return
    comparison, version = done.report.comparison, done.version
    show.table(f"{version.name}: dense against pruned", HEADER, [row.cells for row in rows(comparison)])
    for note in notes(comparison):
        show.line(f"- {note}")
    show.line(f"report       {done.report.html}")
    show.line(f"registered   {version.name} version {version.version}, alias {version.alias}")
    show.line(
        f"serve it     slimgpt serve {version.uri}"
        + (f" --runs {shlex.quote(str(parameters['runs']))}" if parameters.get("runs") else "")
    )


def promote(
    name: str,
    *,
    version: WholeNumber,
    to: str = "champion",
    config: str = "",
    by: str = "",
    runs: str = "",
    options: Annotated[GateFlags, _all] = GateFlags(),
) -> None:
    """Let an alias of the registered model NAME point to a version that passes the gates.

    Args:
        name: Name in the registry.
        version: Which version.
        to: The alias. The version that has it now gets the alias previous.
        config: A YAML file with the section gates. Flags win.
        by: Who promotes, for the audit trail; your user name by default.
        runs: Folder of the runs, whose registry holds NAME; ./runs or SLIMGPT_RUNS by default.
    """
    file = read_config_file(config, {"gates": GateConfig()}, ()) if config else {}
    gates = config_from(GateConfig(), file.get("gates", {}), given(options))
    from tasks.environment import prepare

    workspace = prepare(runs)
    from flows.cli import show
    from tasks.registry.promotion import promote as move

    moved = move(name, version, to, gates, workspace, by=by)
    if moved.gates:
        rows = [(gate.name, f"{gate.value:.4f}", f"{gate.limit:g}") for gate in moved.gates]
        show.table(f"{name} version {version}: gates passed", ("gate", "measured", "limit"), rows)
    show.line(moved.summary)


def rollback(name: str, *, alias: str = "champion", by: str = "", runs: str = "") -> None:
    """Give an alias of the registered model NAME back to the version that had it before.

    Args:
        name: Name in the registry.
        alias: The alias.
        by: Who rolls back, for the audit trail; your user name by default.
        runs: Folder of the runs, whose registry holds NAME; ./runs or SLIMGPT_RUNS by default.
    """
    from tasks.environment import prepare

    workspace = prepare(runs)
    from flows.cli import show
    from tasks.registry.promotion import rollback as move_back

    moved = move_back(name, workspace, alias=alias, by=by)
    show.line(moved.summary)
