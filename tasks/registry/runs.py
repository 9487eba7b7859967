"""One MLflow run per compression: parameters, metrics, data sets, files, and a child run for each of the two models."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException
from requests import RequestException

from deploy.report.files import Report
from slimgpt.checkpoints.lineage import LINEAGE
from slimgpt.evaluation.harness import EvalResult
from slimgpt.report import REPORT
from tasks.environment import RunFolder, Workspace
from tasks.messages import reason
from tasks.registry.client import impatient
from tasks.registry.config import RegistryConfig
from tasks.registry.names import ALIAS
from tasks.registry.run_content import data_of, flat, log, metrics_of, metrics_of_side, source_tags, tags_of

_FULL, _FULL_DATABASE = os.strerror(errno.ENOSPC), "database or disk is full"  # SQLite's words


@dataclass(frozen=True)
class RegistrationInput:
    """What one MLflow run is made of.

    Args:
        model: the pruned checkpoint's folder, as it is to be served.
        parameters: nested; flattened to ``prune.ratio`` and the like.
        dense, pruned: the evaluations.
        report: the report: its title is the registered name.
        folder: the run's folder: bench.json and evaluation-*.json go up with the report.
        config: where it goes.
        machine: system metrics.
        title: of the run; empty for the config's, else the registered name.
        parent: id of the run that this one belongs to; empty for none.
    """

    model: Path
    parameters: dict[str, Any]
    dense: EvalResult
    pruned: EvalResult
    report: Report
    folder: RunFolder
    config: RegistryConfig = RegistryConfig()  # noqa: RUF009  frozen
    machine: list[Metric] = field(default_factory=list)
    title: str = ""
    parent: str = ""

    @property
    def name(self) -> str:
        """Of the registered model."""
        return self.report.comparison.title

    @property
    def run_name(self) -> str:
        """Of the MLflow run."""
        return self.title or self.config.run_name or self.name

    @property
    def files(self) -> dict[str, list[Path]]:
        """Artifact folder -> local files."""
        facts = [self.model / REPORT, self.model / LINEAGE, self.folder.bench / "bench.json"]
        facts += [self.folder.root / f"evaluation-{side}.json" for side in ("dense", "pruned")]
        if self.report.comparison.bench is None:
            facts.remove(self.folder.bench / "bench.json")  # an older run's
        return {"": [self.report.html, self.report.markdown, *facts], "plots": self.report.plots}

    @property
    def description(self) -> str:
        """One line for people."""
        lineage = self.report.comparison.lineage
        before, after = lineage.before("parameters") / 1e6, lineage.after("parameters") / 1e6
        return (
            f"{lineage.base_model} without {lineage.ratio:.1%} of its projection parameters "
            f"({before:.1f} M -> {after:.1f} M)."
        )


@dataclass
class Begun:
    """What is not finished yet."""

    runs: list[str] = field(default_factory=list)
    model_id: str = ""

    def finish(self, client: MlflowClient) -> None:
        """Mark all runs as finished: everything is in them."""
        for run_id in self.runs:
            client.set_terminated(run_id, "FINISHED")

    def give_up(self, client: MlflowClient) -> None:
        """Mark all of it as failed, if the server still responds.

        Otherwise a run that never ends and a pending model are left. Neither passes for a complete one.
        """
        with impatient(), contextlib.suppress(MlflowException, RequestException):
            if self.model_id:
                client.finalize_logged_model(self.model_id, LoggedModelStatus.FAILED)
            for run_id in self.runs:
                client.set_terminated(run_id, "FAILED")


@contextlib.contextmanager
def recording(client: MlflowClient, name: str, workspace: Workspace) -> Iterator[Begun]:
    """Gives what is written meanwhile to; what fails on the way is marked as failed.

    Raises:
        ConnectionError: when the server stops answering; the alias has not moved, since that comes last.
        OSError: when the disk is full; the message says of what.
    """
    begun = Begun()
    try:
        yield begun
    except (MlflowException, RequestException) as error:
        begun.give_up(client)
        raise _failed(name, workspace, error) from None
    except OSError as error:  # of its own, where files and database are folders of this machine
        begun.give_up(client)
        if _FULL not in str(error):
            raise
        raise _failed(name, workspace, error) from None
    except BaseException:
        begun.give_up(client)
        raise


def _failed(name: str, workspace: Workspace, error: Exception) -> OSError:
    """The error for the user: a server that failed may be back in a minute, a disk that is full is not."""
    why = f"while {name} was registered ({reason(error, workspace.tracking_uri)})"
    stays = f"the alias {ALIAS} has not moved"
    served = workspace.tracking_uri.startswith(("http:", "https:"))
    if not served and any(words in str(error) for words in (_FULL, _FULL_DATABASE)):
        return OSError(
            f"the disk of {workspace.root} became full {why}; {stays}: make room there, or leave the weights where "
            "they are (registry.weights reference), and run this again"
        )
    return ConnectionError(f"MLflow failed {why}; {stays}: run this again when MLflow is back")


def record_run(client: MlflowClient, request: RegistrationInput, workspace: Workspace, begun: Begun) -> str:
    """Write the run and its two children, and return its id. They are left running: ``begun`` has them."""
    comparison, params = request.report.comparison, flat(request.parameters)
    place = experiment(client, request.config.experiment, workspace)
    about = {**tags_of(comparison), **source_tags(), "mlflow.note.content": request.description}
    if request.parent:
        about["mlflow.parentRunId"] = request.parent
    run_id = str(client.create_run(place, run_name=request.run_name, tags=about).info.run_id)
    begun.runs.append(run_id)
    log(client, run_id, params, [*metrics_of(comparison), *request.machine])
    client.log_inputs(run_id, data_of(comparison.lineage, request.dense.texts))
    for side in ("dense", "pruned"):
        nested = {"mlflow.parentRunId": run_id, "side": side, "base_model": comparison.lineage.base_model}
        child = client.create_run(place, run_name=f"{request.run_name} {side}", tags={**source_tags(), **nested})
        begun.runs.append(child.info.run_id)
        evaluation = {name: value for name, value in params.items() if name.startswith(("evaluation.", "bench."))}
        log(client, child.info.run_id, evaluation, metrics_of_side(comparison, side))
    for folder, files in request.files.items():
        for file in files:
            client.log_artifact(run_id, str(file), folder or None)
    return run_id


def experiment(client: MlflowClient, name: str, workspace: Workspace) -> str:
    """The id of the experiment; made where there is none of the name."""
    existing = client.get_experiment_by_name(name)
    if existing is not None:
        return str(existing.experiment_id)
    # A server knows where artifacts go; without one MLflow would put them into the current folder.
    local = not workspace.tracking_uri.startswith(("http:", "https:"))
    try:
        return str(client.create_experiment(name, workspace.mlflow_artifacts.as_uri() if local else None))
    except MlflowException:
        if (existing := client.get_experiment_by_name(name)) is None:
            raise
        return str(existing.experiment_id)  # another process was quicker


def parameters_of(**configs: Any) -> dict[str, Any]:
    """Dataclasses and plain values as one nested dict of parameters."""
    return {
        name: dataclasses.asdict(config)
        if dataclasses.is_dataclass(config) and not isinstance(config, type)
        else config
        for name, config in configs.items()
    }
