"""MLflow's experiments: whether they take runs, and where their files lie."""

import platform
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException

from tasks.environment import ARTIFACTS, Workspace, is_server
from tasks.messages import without_password

_OWN_HOSTS = ("127.0.0.1", "localhost", "::1", platform.node())


def check_experiment(client: MlflowClient, name: str) -> str | None:
    """The id of the experiment; None where there is none of the name yet.

    Raises:
        ValueError: when it was deleted: MLflow keeps the name and takes no runs.
        FileNotFoundError: when its files lie in a folder that is not on this machine, or with an unnamed server.
    """
    existing = client.get_experiment_by_name(name)
    if existing is None:
        return None
    if existing.lifecycle_stage == LifecycleStage.DELETED:
        raise ValueError(
            f"the MLflow experiment {name!r} was deleted and takes no runs: restore it (mlflow experiments restore "
            f"--experiment-id {existing.experiment_id}), or name another (registry.experiment)"
        )
    _check_store(client, existing)
    return str(existing.experiment_id)


def check_server_of(what: str, location: str, uri: str) -> None:
    """Refuse artifacts that go through MLflow's server where no server is asked, but its database.

    Args:
        what: whose artifacts they are, for the message.
        location: of the artifacts.
        uri: of the registry.

    Raises:
        FileNotFoundError: naming the remedy.
    """
    if location.startswith("mlflow-artifacts:") and not is_server(uri):
        raise FileNotFoundError(
            f"{what} keeps its files with an MLflow server, and {without_password(uri)} is a database alone: start the "
            "server (make up) and set MLFLOW_TRACKING_URI to its address; for new runs another experiment would do, "
            "too (registry.experiment)"
        )


def _check_store(client: MlflowClient, existing: Experiment) -> None:
    """Refuse a store that no file reaches from here, and a folder of another machine or of another time.

    Such a folder MLflow would make anew here, and write to.
    """
    check_server_of(f"the MLflow experiment {existing.name!r}", existing.artifact_location, client.tracking_uri)
    folder = local_folder(existing.artifact_location)
    if folder is None or folder.exists() or folder.parent.exists():
        return
    place = f"the MLflow experiment {existing.name!r} keeps its files in {folder}, and there is no {folder.parent} here"
    # MLflow makes its folders with the first file: on the server's own machine there may be none yet.
    if (host := urlsplit(client.tracking_uri).hostname) and host not in _OWN_HOSTS:
        raise FileNotFoundError(
            f"{place}: it is a folder of the server's machine. Start the server with --artifacts-destination in place "
            "of --default-artifact-root, so that it takes the files itself, and name a new experiment "
            "(registry.experiment); or mount that folder here"
        )
    if not host and folder.name == ARTIFACTS:
        raise FileNotFoundError(
            f"{place}: if the folder of the runs was moved, make a link to it there (ln -s), which older versions need "
            "too; or name another experiment (registry.experiment)"
        )


def experiment(client: MlflowClient, name: str, workspace: Workspace) -> str:
    """The id of the experiment, as ``check_experiment`` finds it; made where there is none of the name."""
    if (existing := check_experiment(client, name)) is not None:
        return existing
    # A server knows where artifacts go; without one MLflow would put them into the current folder.
    local = not is_server(workspace.tracking_uri)
    try:
        made = client.create_experiment(name, workspace.mlflow_artifacts.as_uri() if local else None)
        _check_store(client, client.get_experiment(made))
        return str(made)
    except MlflowException:
        if (existing := check_experiment(client, name)) is None:
            raise
        return existing  # another process was quicker


def artifact_folder(client: MlflowClient, experiment: str, workspace: Workspace) -> Path | None:
    """The folder of this machine that takes the files of ``experiment``; None where a server or a store does."""
    if (existing := client.get_experiment_by_name(experiment)) is not None:
        return local_folder(existing.artifact_location)
    served = is_server(workspace.tracking_uri)
    return None if served else workspace.mlflow_artifacts


def local_folder(location: str) -> Path | None:
    """The folder that an artifact location of MLflow names, where it is one of this machine."""
    if location.startswith("file:"):  # a URI: a blank is %20 in it
        return Path(url2pathname(urlsplit(location).path))
    return Path(location) if location.startswith("/") else None
