"""Compress a model: prune, recover, quantise, evaluate, package, measure, register, report.

python -m flows.compress                 # the built-in model on embedded defaults; no server needed
slimgpt compress --ratio 0.25            # the same flow, with a flag for each parameter
"""

from dataclasses import dataclass
from pathlib import Path

from prefect import flow

from deploy.report.files import Report
from flows.defaults import (
    BENCH,
    EVALUATION,
    PRUNE,
    QUANTIZE,
    RECOVER,
    REGISTRY,
    BenchSection,
    EvaluationSection,
    PruneSection,
    QuantizeSection,
    RecoverSection,
    RegistrySection,
    check_quantization,
    check_recovery,
)
from flows.prefect_api import reached
from tasks.environment import prepare
from tasks.preflight.chain import Keep, plan_chain
from tasks.preflight.disk import check_disk
from tasks.preflight.forecast import Forecast, forecast
from tasks.preflight.measurable import check_measurable
from tasks.preflight.models import resolve, settled
from tasks.preflight.request import Skippable, check_request
from tasks.registry.live_run import open_run
from tasks.registry.names import RegisteredVersion, default_name
from tasks.registry.runs import RegistrationInput, parameters_of
from tasks.retrying import ON_NETWORK_FAULTS
from tasks.steps.artifacts import publish_artifacts
from tasks.steps.benchmarking import benchmark
from tasks.steps.bundling import package
from tasks.steps.chain import run_chain
from tasks.steps.evaluation import EvalRequest, evaluate_model
from tasks.steps.milliseconds import timed
from tasks.steps.quantization import QuantizeStage
from tasks.steps.recovery import stages_of
from tasks.steps.registration import register
from tasks.steps.reporting import write_report


@dataclass(frozen=True)
class Compressed:
    """What a compression leaves: its folder, its report, its place in the registry."""

    folder: Path
    report: Report
    version: RegisteredVersion


@flow(name="compress", persist_result=False)
def compress(
    model: str = "smollm2",
    name: str = "",
    prune: PruneSection = PRUNE,
    recover: RecoverSection = RECOVER,
    quantize: QuantizeSection = QUANTIZE,
    evaluation: EvaluationSection = EVALUATION,
    bench: BenchSection = BENCH,
    registry: RegistrySection = REGISTRY,
    first_ratios: tuple[float, ...] = (),
    rounds: int = 1,
    keep: Keep = "last",
    skip: tuple[Skippable, ...] = (),
    revision: str = "",
    runs: str = "",
    dry_run: bool = False,
) -> Compressed | Forecast:
    """Prune a model, recover and quantise it if asked to, evaluate and serve it against the dense one, register it.

    Args:
        model: A folder, a GGUF file, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        name: Name in the registry; empty for the model's own and -slim.
        prune: How the model is pruned.
        recover: How the pruned model is trained again; no tokens: not at all.
        quantize: How the model is stored in fewer bits in the end; no scheme: not at all.
        evaluation: What is measured of both models.
        bench: The load that both models are measured under.
        registry: Where it goes in MLflow, and whether the weights go along.
        first_ratios: Prune in several steps: the shares of the dense model's projection parameters that are gone after
            each step before the last one, whose share is the ratio. Each is followed by a training of its own.
        rounds: Prune, and train, in so many turns, whose ratios rise in equal steps: first_ratios need not be given.
        keep: all keeps the models that the steps before the last one make; last removes them.
        skip: Stages to leave out, evaluate or benchmark: for quick trials, and for machines that cannot serve.
        revision: Commit or tag on the hub; empty for the newest.
        runs: Folder for the files of all runs; empty for ./runs or SLIMGPT_RUNS.
        dry_run: Check everything, say what each stage would take, and stop.
    """
    workspace = prepare(runs)
    ready = check_request(name or default_name(model), evaluation, workspace, skip, registry.experiment)
    dense = resolve(model, revision, workspace)
    name = name or default_name(dense.label)  # behind an id in the registry may be a version with a name
    ready = check_measurable(dense.folder, evaluation, bench, ready)
    check_recovery(recover)
    check_quantization(quantize)
    teacher = resolve(recover.teacher, "", workspace).folder if recover.teacher and recover.tokens else None
    stages = stages_of(prune, recover, teacher, first_ratios, rounds)
    stages += [QuantizeStage(quantize)] if quantize.scheme else []
    chain = plan_chain(dense, timed(stages, dense, bench, measure=not dry_run))
    folder = workspace.run(name, chain.facts())
    check_disk([(chain, folder)], registry, workspace, keep)
    if dry_run:
        return forecast({"": (chain, folder)}, keep)
    plain = {"model": model, "revision": revision, "first_ratios": list(first_ratios), "rounds": rounds}
    plain |= {"keep": keep, "skip": list(skip)}
    named = {"prune": settled(prune, dense.folder), "evaluation": settled(evaluation, dense.folder)}
    parameters = parameters_of(**plain, **named, recover=recover, quantize=quantize, bench=bench)
    with open_run(name, parameters, registry, workspace, folder) as run:
        pruned = run_chain(chain, folder, keep, run)
        before = after = None
        if "evaluate" not in skip:
            before = evaluate_model(EvalRequest("dense", dense.checkpoint, evaluation, ready.data), folder, run)
            after = evaluate_model(EvalRequest("pruned", pruned, evaluation, ready.data), folder, run)
        bundle = package(pruned, before, after, name, folder, registry)
        speed = benchmark(dense.folder, bundle.model, bench, ready, folder, run)
        report = write_report(name, pruned.lineage, dense.checkpoint.digest, before, after, speed, parameters, folder)
        request = RegistrationInput(
            *(bundle.model, parameters, before, after, report, folder, registry),
            without_evaluation="evaluate" in skip,
        )
        version = register.with_options(**ON_NETWORK_FAULTS)(request, run)
    publish_artifacts(report, version, workspace.tracking_uri)
    return Compressed(folder.root, report, version)


if __name__ == "__main__":
    with reached():
        compress()
