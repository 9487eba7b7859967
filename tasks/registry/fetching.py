"""Fetch a registered or logged model by its URI, and compare it with the checksum that was registered."""

import logging
import re
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from slimgpt.files import folder_sha256, partial_folder
from tasks.environment import Workspace
from tasks.registry.client import explained, open_client
from tasks.registry.experiments import check_server_of, local_folder
from tasks.registry.names import CHECKSUM, LOCATION, MODEL_PATH, MODEL_URI


def fetch_model(uri: str, workspace: Workspace | None = None) -> Path:
    """The Hugging Face folder of ``models:/NAME@alias``, ``models:/NAME/3``, ``models:/m-ID`` or ``runs:/ID``.

    Where the artifact store is a folder of this machine, its own folder is returned: nothing is copied. Otherwise the
    files are downloaded once, under a temporary name until they are complete. Every time they are compared with the
    checksum that was registered.

    Raises:
        ValueError: when the URI is none of these.
        FileNotFoundError: when there is no such model, version or alias, or it is incomplete.
        ConnectionError: when the server does not answer.
        OSError: when a file is not the one that was registered.
    """
    workspace = workspace or Workspace.at()
    match = MODEL_URI.fullmatch(uri)
    if not match or (match["scheme"] == "models" and not re.search(r"@.|/.|^m-", match["rest"])):
        raise ValueError(f"{uri!r} names no model; use models:/NAME@challenger, models:/NAME/1 or runs:/RUN_ID")
    client = open_client(workspace)
    try:
        model = _logged_model(client, match["scheme"], match["rest"].strip("/"))
    except MlflowException as error:
        raise FileNotFoundError(
            f"{uri}: {str(error).splitlines()[0].rstrip('.')}; see the registry's list of models"
        ) from None
    if model.status != LoggedModelStatus.READY:
        raise FileNotFoundError(f"{uri} is incomplete (its status is {model.status}): its registration did not finish")
    if LOCATION in model.tags:
        folder = Path(model.tags[LOCATION])
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{uri} was registered by reference to {folder}, which is not there on this machine"
            )
    elif (kept := local_folder(model.artifact_location)) is not None:
        folder = kept / MODEL_PATH
        if not kept.is_dir():
            raise FileNotFoundError(
                f"the files of {uri} were stored in {kept}, which is not there on this machine: if the folder of the "
                "runs was moved, make a link to it in its old place (ln -s); if that is a folder of the MLflow "
                "server's machine, mount it here"
            )
    else:
        folder = workspace.fetched / model.model_id
        if not folder.is_dir():
            check_server_of(uri, model.artifact_location, workspace.tracking_uri)
            with explained(f"{uri} was fetched", "register it again if its store has lost the files", workspace):
                _download(client, model, folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{uri} holds no {MODEL_PATH}/config.json: it was not registered by slimgpt compress")
    _verify(uri, folder, model.tags.get(CHECKSUM, ""))
    return folder


def registered_label(uri: str, workspace: Workspace) -> str:
    """``NAME@3`` of the version that holds the model behind ``runs:/ID`` or ``models:/m-ID``; empty where none does."""
    match = MODEL_URI.fullmatch(uri)
    assert match is not None
    client = open_client(workspace)
    model = _logged_model(client, match["scheme"], match["rest"].strip("/"))
    versions = client.search_model_versions(f"run_id='{model.source_run_id}'")
    return next((f"{one.name}@{one.version}" for one in versions if _model_id(one) == model.model_id), "")


def _verify(uri: str, folder: Path, registered: str) -> None:
    if not registered:
        logging.getLogger(__name__).warning("%s was registered without a checksum: its files are not verified", uri)
    elif (actual := folder_sha256(folder)) != registered:
        raise OSError(
            f"{uri}: the files in {folder} are not those that were registered (sha256 {actual[:12]}, registered "
            f"{registered[:12]}); register it again, or, where it is a download, remove the folder to fetch it again"
        )


def _logged_model(client: MlflowClient, scheme: str, rest: str) -> LoggedModel:
    if scheme == "runs":
        run_id, _, name = rest.partition("/")
        outputs = client.get_run(run_id).outputs
        models = [client.get_logged_model(model.model_id) for model in (outputs.model_outputs if outputs else [])]
        models = [model for model in models if not name or model.name == name]
        if len(models) != 1:
            raise FileNotFoundError(
                f"runs:/{rest} has {len(models)} logged models; name one as runs:/RUN_ID/MODEL_NAME"
            )
        return models[0]
    version = named_version(client, rest)
    if version is None:
        return client.get_logged_model(rest)
    return client.get_logged_model(_model_id(version))


def _model_id(version: ModelVersion) -> str:
    return str(version.model_id or version.source.removeprefix("models:/"))


def named_version(client: MlflowClient, rest: str) -> ModelVersion | None:
    """The version that ``NAME@alias`` or ``NAME/3``, the rest of a URI, names; None where it names none.

    Raises:
        MlflowException: when there is no such version.
    """
    if "@" in rest:
        return client.get_model_version_by_alias(*rest.rsplit("@", 1))
    return client.get_model_version(*rest.rsplit("/", 1)) if "/" in rest else None


def _download(client: MlflowClient, model: LoggedModel, folder: Path) -> None:
    with partial_folder(folder) as partial:
        uri = f"{model.artifact_location}/{MODEL_PATH}"
        downloaded = Path(download_artifacts(artifact_uri=uri, dst_path=str(partial), tracking_uri=client.tracking_uri))
        try:
            downloaded.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise
