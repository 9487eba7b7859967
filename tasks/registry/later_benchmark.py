"""A benchmark made after a version was registered, perhaps on another machine, and added to that version."""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LifecycleStage, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from deploy.bench.results import BenchReport
from slimgpt.checkpoints.lineage import checkpoint_digest, load_lineage
from tasks.environment import Workspace
from tasks.registry.client import explained, open_client
from tasks.registry.experiments import check_experiment
from tasks.registry.fetching import named_version
from tasks.registry.live_run import PARENT
from tasks.registry.names import MODEL_URI
from tasks.registry.run_content import FAILURE, SETTING, bench_metrics, bench_metrics_of_side, bench_tags, flat, log


def find_version(uri: str, dense: Path, pruned: Path, workspace: Workspace) -> ModelVersion:
    """The version that ``uri`` names now, where a benchmark of these two models belongs to it.

    Args:
        uri: ``models:/NAME/3`` or ``models:/NAME@alias``.
        dense: folder of the model that is compared with.
        pruned: folder of the version's model.
        workspace: of the registry.

    Raises:
        ValueError: when ``uri`` names no version, or the version was compared with another model; when its run or the
            experiment was deleted.
        FileNotFoundError: when there is no such version, no longer a run behind it, or no place for the run's files.
        ConnectionError: when the server does not answer.
    """
    named = MODEL_URI.fullmatch(uri)
    client = open_client(workspace)
    try:
        version = named_version(client, named["rest"]) if named and named["scheme"] == "models" else None
    except MlflowException as error:
        raise FileNotFoundError(f"{uri}: {str(error).splitlines()[0]}") from None
    if version is None:
        raise ValueError(f"the benchmark of {uri} cannot be recorded: name a version, such as models:/NAME/3")
    if not version.run_id:
        raise ValueError(f"the benchmark of {uri} cannot be recorded: no run stands behind that version")
    _check_run(client, uri, version.run_id)
    _check_compared_with(version, dense, pruned)
    return version


def _check_run(client: MlflowClient, uri: str, run_id: str) -> None:
    """Refuse a run that takes no figures."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise FileNotFoundError(f"{uri}: {str(error).splitlines()[0]}; nothing can be recorded of it") from None
    check_experiment(client, client.get_experiment(run.info.experiment_id).name)
    if run.info.lifecycle_stage == LifecycleStage.DELETED:
        raise ValueError(
            f"the run {run_id} behind {uri} was deleted and takes no figures: restore it (mlflow runs restore "
            f"--run-id {run_id}), or leave out --record"
        )


def _check_compared_with(version: ModelVersion, dense: Path, pruned: Path) -> None:
    """Refuse another dense model: promotions would take its speed for that of the version's own."""
    wanted = version.tags.get("dense_model", "")
    inputs = {step.input: step.model for step in load_lineage(pruned).steps if step.input}
    model = inputs.get(checkpoint_digest(dense), "")
    if inputs and (not model or (wanted and model != wanted)):
        raise ValueError(
            f"{dense} is not the model that {version.name} version {version.version} was compared with "
            f"({wanted or ', '.join(inputs.values())}): measure against that one, or leave out --record"
        )


def record_benchmark(version: ModelVersion, report: BenchReport, folder: Path, workspace: Workspace) -> None:
    """Add a benchmark to a version and to the run behind it; of two, the later one counts.

    Args:
        version: as ``find_version`` returns it.
        report: what was measured.
        folder: holds ``bench.json``.
        workspace: of the registry.

    Raises:
        ConnectionError: when the server stops answering; once it does, the call can be repeated.
    """
    client = open_client(workspace)
    what = f"the benchmark of {version.name} version {version.version} was recorded"
    with explained(what, f"bench.json is in {folder}", workspace):
        run = client.get_run(version.run_id)
        log(client, version.run_id, {}, bench_metrics(report))
        client.log_artifact(version.run_id, str(folder / "bench.json"))
        for child in client.search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{version.run_id}'"):
            log(client, child.info.run_id, {}, bench_metrics_of_side(report, child.data.tags["side"]))
        client.log_batch(version.run_id, tags=[RunTag(key, text) for key, text in bench_tags(report).items()])
        _tag(client, version, report)


def _tag(client: MlflowClient, version: ModelVersion, report: BenchReport) -> None:
    """What was measured, and under what (``SETTING``): the run's parameters are those of another benchmark, or none."""
    if FAILURE in client.get_model_version(version.name, version.version).tags:
        client.delete_model_version_tag(version.name, version.version, FAILURE)
    for key, text in {**flat(report.config, SETTING), **bench_tags(report)}.items():
        client.set_model_version_tag(version.name, version.version, key, text)
