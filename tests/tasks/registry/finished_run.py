"""A compression on a tiny model up to its registration; as a program, that registration: PLACE NAME RUNS."""

import json
import os
import sys
from pathlib import Path

from prefect import flow
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings

from deploy.bundle.folder import write_bundle
from slimgpt.checkpoints.lineage import load_lineage
from slimgpt.config import EvalConfig, PruneConfig
from slimgpt.engine.pruner import prune
from slimgpt.evaluation.harness import EvalResult, evaluate
from tasks.environment import RunFolder, Workspace
from tasks.registry.config import RegistryConfig
from tasks.registry.live_run import open_run
from tasks.registry.names import RegisteredVersion
from tasks.registry.runs import RegistrationInput, parameters_of
from tasks.retrying import ON_NETWORK_FAULTS
from tasks.steps.artifacts import publish_artifacts
from tasks.steps.benchmarking import Benchmark
from tasks.steps.registration import register
from tasks.steps.reporting import write_report
from tests import processes
from tests.tiny_models import write_dense

EVALUATION = EvalConfig(tasks=("none",), perplexity="python", seq_len=64, max_blocks=2)
PRUNE = PruneConfig(num_samples=4, seq_len=64, calibration="python", ffn_multiple=4)


def make(place: Path, *, packaged: bool = True) -> Path:
    """Prune, evaluate and package; what is left is what a flow leaves in a run's folder."""
    folder = RunFolder(place / "run")
    dense = write_dense(place / "tiny")
    folder.root.mkdir()
    prune(dense, folder.model, PRUNE)
    for side, model in (("dense", dense), ("pruned", folder.model)):
        result = evaluate(model, EVALUATION)
        (folder.root / f"evaluation-{side}.json").write_text(json.dumps(result.to_dict()))
    if packaged:
        write_bundle(folder.model, folder.bundle, name="tiny")
    return folder.root


def request(root: Path, name: str, *, model: Path | None = None, **rest: object) -> RegistrationInput:
    folder = RunFolder(root)
    sides = [
        EvalResult.from_dict(json.loads((root / f"evaluation-{side}.json").read_text())) for side in ("dense", "pruned")
    ]
    parameters = parameters_of(model=str(root.parent / "tiny"), revision="", prune=PRUNE, evaluation=EVALUATION)
    skipped = Benchmark(None, "benchmark: not here")
    report = write_report.fn(name, load_lineage(folder.model), sides[0].digest, *sides, skipped, parameters, folder)
    return RegistrationInput(model or folder.bundle / "model", parameters, *sides, report, folder, **rest)


def registered(request: RegistrationInput, workspace: Workspace) -> RegisteredVersion:
    """Its run opened, completed and finished, as a flow does it; without Prefect."""
    with (
        disable_run_logger(),
        open_run(request.name, request.parameters, request.config, workspace, request.folder) as run,
    ):
        return register.fn(request, run)


@flow
def registration(root: str, name: str, runs: str, registry: RegistryConfig) -> str:
    workspace = Workspace.at(runs)
    complete = request(Path(root), name, config=registry)
    with open_run(name, complete.parameters, registry, workspace, complete.folder) as run:
        # As the flows call it, sooner: MLflow refuses a data set that another run enters at the same moment.
        version = register.with_options(**(ON_NETWORK_FAULTS | {"retry_delay_seconds": 1}))(complete, run)
    publish_artifacts(complete.report, version, workspace.tracking_uri)
    return version.version


def in_process(root: Path, name: str, runs: Path, api: str, mlflow: str, log: Path) -> None:
    """That registration in a process of tests/processes.py, its output in ``log``."""
    processes.write_output_to(log)
    os.environ["MLFLOW_TRACKING_URI"] = mlflow
    with temporary_settings({PREFECT_API_URL: api}):
        registration(str(root), name, str(runs), RegistryConfig())


if __name__ == "__main__":
    registration(*sys.argv[1:], RegistryConfig())
