"""Compress a model: prune, evaluate, package, measure, register, report.

python -m flows.compress                 # the built-in model on embedded defaults; no server needed
slimgpt compress --ratio 0.25            # the same flow, with a flag for each parameter
"""

from dataclasses import dataclass
from pathlib import Path

from flows.defaults import BENCH, EVALUATION, PRUNE, REGISTRY
from tasks.environment import prepare

prepare()  # before Prefect, which reads its settings when it is imported

from prefect import flow  # noqa: E402

from deploy.benchmark import BenchConfig  # noqa: E402
from flows.prefect_api import reached  # noqa: E402
from slimgpt.config import EvalConfig, PruneConfig  # noqa: E402
from tasks.benchmarking import benchmark  # noqa: E402
from tasks.bundling import package  # noqa: E402
from tasks.evaluation import EvalRequest, evaluate_model  # noqa: E402
from tasks.machine import MachineWatch  # noqa: E402
from tasks.models import resolve  # noqa: E402
from tasks.preflight import check_disk, check_request, plan_pruning  # noqa: E402
from tasks.pruning import PruneRequest, prune_model  # noqa: E402
from tasks.recording import RegistrationInput, parameters_of  # noqa: E402
from tasks.registration import register  # noqa: E402
from tasks.registry import RegisteredVersion, default_name  # noqa: E402
from tasks.registry_config import RegistryConfig  # noqa: E402
from tasks.reporting import Report, publish_artifacts, write_report  # noqa: E402
from tasks.retrying import ON_NETWORK_FAULTS  # noqa: E402


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
    prune: PruneConfig = PRUNE,
    evaluation: EvalConfig = EVALUATION,
    bench: BenchConfig = BENCH,
    registry: RegistryConfig = REGISTRY,
    revision: str = "",
    runs: str = "",
) -> Compressed:
    """Prune a model, evaluate it against the dense one, serve and measure both, register the result as ``challenger``.

    Args:
        model: A folder, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        name: Name in the registry; empty for the model's own and -slim.
        prune: How the model is pruned.
        evaluation: What is measured of both models.
        bench: The load that both models are measured under.
        registry: Where it goes in MLflow, and whether the weights go along.
        revision: Commit or tag on the hub; empty for the newest.
        runs: Folder for the files of all runs; empty for ./runs or SLIMGPT_RUNS.
    """
    workspace, machine = prepare(runs), MachineWatch(registry.machine_seconds)
    name = name or default_name(model)
    ready = check_request(name, evaluation, workspace)
    dense = resolve(model, revision, workspace)
    wanted = PruneRequest(dense, prune, plan_pruning(dense.folder, prune))
    folder = workspace.run(name, wanted.facts)
    check_disk([(wanted.plan, folder)], registry, workspace)
    pruned = prune_model(wanted, folder)
    before = evaluate_model(EvalRequest("dense", dense.folder, dense.digest, evaluation, ready.data), folder)
    after = evaluate_model(EvalRequest("pruned", pruned.folder, pruned.digest, evaluation, ready.data), folder)
    bundle = package(pruned, before, after, name, folder)
    speed = benchmark(dense.folder, bundle.model, bench, ready, folder)
    asked = parameters_of(model=model, revision=revision, prune=prune, evaluation=evaluation, bench=bench)
    report = write_report(name, pruned.report, before, after, speed, asked, folder)
    whole = RegistrationInput(bundle.model, asked, before, after, report, folder, registry, machine.stop())
    version = register.with_options(**ON_NETWORK_FAULTS)(whole, workspace)
    publish_artifacts(report, version, workspace.tracking_uri)
    return Compressed(folder.root, report, version)


if __name__ == "__main__":
    with reached():
        compress()
