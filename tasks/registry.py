"""The MLflow side that needs no Prefect: a client that answers within seconds, and models fetched by URI."""

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from slimgpt.files import folder_sha256
from tasks.environment import Workspace, prepare

ALIAS = "challenger"
MODEL_PATH = "artifacts/model"  # of the Hugging Face folder inside a logged model
CHECKSUM = "sha256"  # tag: over the names and contents of that folder's files
LOCATION = "location"  # tag: where the folder is, when it was registered by reference
_URI = re.compile(r"(?P<scheme>models|runs):/+(?P<rest>.+)")


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry."""

    name: str
    version: str
    alias: str
    run_id: str
    model_id: str

    @property
    def uri(self) -> str:
        """What other tools take: it follows the alias."""
        return f"models:/{self.name}@{self.alias}"


def is_model_uri(model: str) -> bool:
    """Whether ``model`` names a logged or registered model rather than a folder or a hub id."""
    return bool(_URI.fullmatch(model))


def check_name(name: str) -> str:
    """Return ``name`` where it can name a registered model.

    Raises:
        ValueError: when MLflow or a server's URLs could not carry it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name is {name!r}; a registered model's name has letters, digits and . _ - only")
    return name


def default_name(model: str) -> str:
    """The registered name of what becomes of ``model``: its last part, without what MLflow refuses, and ``-slim``."""
    last = model.rstrip("/").rsplit("/", 1)[-1].partition("@")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.").removesuffix("-slim") + "-slim"


def open_client(workspace: Workspace) -> MlflowClient:
    """A client of the tracking server (``MLFLOW_TRACKING_URI``) or of the workspace's SQLite file, checked to answer.

    Raises:
        ConnectionError: when the server does not answer within seconds.
        OSError: when the SQLite file cannot be opened.
    """
    prepare(workspace.root)
    # Tables made on the first use, an input example that fits, a file of uv's that is not looked for: no news.
    for chatty in ("mlflow.store.db.utils", "alembic", "mlflow.pyfunc", "mlflow.utils.uv_utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    uri = workspace.tracking_uri
    make_database(uri)
    try:
        with impatient():
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # MLflow, requests, SQLAlchemy: whatever it is, the server cannot be used
        raise ConnectionError(
            f"MLflow at {without_password(uri)} does not answer ({reason(error, uri)}); "
            "start it, correct MLFLOW_TRACKING_URI, or unset it to use a local SQLite file"
        ) from None
    return client


def make_database(uri: str) -> None:
    """Make MLflow's tables, all or none: MLflow takes a hundred steps, and cannot go on where it was killed in them.

    Args:
        uri: where it is no SQLite file, or the file is there, nothing is done.

    Raises:
        OSError: when there can be no such file.
    """
    if not uri.startswith("sqlite:") or not (database := make_url(uri).database) or (file := Path(database)).exists():
        return
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as temporary:
            made = Path(temporary) / file.name
            SqlAlchemyStore(f"sqlite:///{made}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
            try:
                os.link(made, file)
            except OSError:
                if not file.exists():  # no hard links here; else another process was quicker
                    made.replace(file)
    except (OSError, SQLAlchemyError) as error:
        raise OSError(
            f"MLflow's database {file} cannot be made: {reason(error, '')}; choose another runs folder"
        ) from None


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """MLflow's own patience is minutes, which suits uploads; whether a server is there is known in seconds."""
    limits = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def without_password(uri: str) -> str:
    """``uri`` as it may be shown."""
    parts = urlsplit(uri)
    if parts.password is None and parts.username is None:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def reason(error: Exception, uri: str) -> str:
    """The cause in a few words, without user or password: it lies at the end of what requests and SQLAlchemy say."""
    text, parts = str(error) or type(error).__name__, urlsplit(uri)
    if found := re.search(r"\[Errno [^\]]+\] [\w ]+|timed out|Name or service not known", text):
        return found[0]
    text = text.splitlines()[0][-160:]
    for secret in (parts.password, parts.username):
        if secret:
            text = text.replace(secret, "***")
    return text


def set_alias(client: MlflowClient, name: str, alias: str, version: str) -> None:
    """Let ``alias`` stand for ``version``, also where another process makes the alias at the same moment.

    Raises:
        MlflowException: when the server refuses.
    """
    try:
        client.set_registered_model_alias(name, alias, version)
    except MlflowException:
        # MLflow looks whether the alias is there and then inserts it: on PostgreSQL two may both find none.
        if alias not in client.get_registered_model(name).aliases:
            raise
        client.set_registered_model_alias(name, alias, version)


def artifact_folder(client: MlflowClient, experiment: str, workspace: Workspace) -> Path | None:
    """The folder of this machine that takes the files of ``experiment``; None where a server or a store does."""
    if (found := client.get_experiment_by_name(experiment)) is not None:
        return local_folder(found.artifact_location)
    served = workspace.tracking_uri.startswith(("http:", "https:"))
    return None if served else workspace.mlflow_artifacts


def local_folder(location: str) -> Path | None:
    """The folder that an artifact location of MLflow names, where it is one of this machine."""
    return Path(location.removeprefix("file://")) if location.startswith(("file:", "/")) else None


def fetch_model(uri: str, workspace: Workspace | None = None) -> Path:
    """The Hugging Face folder of ``models:/NAME@alias``, ``models:/NAME/3``, ``models:/m-ID`` or ``runs:/ID``.

    Where the artifact store is a folder of this machine, its own folder is returned: nothing is copied. Otherwise the
    files are downloaded once, under a temporary name until they are whole. Every time they are compared with the
    checksum that was registered.

    Raises:
        ValueError: when the URI is none of these.
        FileNotFoundError: when there is no such model, version or alias, or it is not whole.
        ConnectionError: when the server does not answer.
        OSError: when a file is not the one that was registered.
    """
    workspace = workspace or Workspace.at()
    found = _URI.fullmatch(uri)
    if not found or (found["scheme"] == "models" and not re.search(r"@.|/.|^m-", found["rest"])):
        raise ValueError(f"{uri!r} names no model; use models:/NAME@challenger, models:/NAME/1 or runs:/RUN_ID")
    client = open_client(workspace)
    try:
        model = _logged_model(client, found["scheme"], found["rest"].strip("/"))
    except MlflowException as error:
        raise FileNotFoundError(
            f"{uri}: {str(error).splitlines()[0].rstrip('.')}; see the registry's list of models"
        ) from None
    if model.status != LoggedModelStatus.READY:
        raise FileNotFoundError(f"{uri} is not whole (its status is {model.status}): its registration did not finish")
    if LOCATION in model.tags:
        folder = Path(model.tags[LOCATION])
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{uri} was registered by reference to {folder}, which is not there on this machine"
            )
    elif (kept := local_folder(model.artifact_location)) is not None:
        folder = kept / MODEL_PATH
    else:
        folder = workspace.fetched / model.model_id
        if not folder.is_dir():
            _download(client, model, folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{uri} holds no {MODEL_PATH}/config.json: it was not registered by slimgpt compress")
    _verify(uri, folder, model.tags.get(CHECKSUM, ""))
    return folder


def _verify(uri: str, folder: Path, registered: str) -> None:
    if not registered:
        logging.getLogger(__name__).warning("%s was registered without a checksum: its files are not verified", uri)
    elif (found := folder_sha256(folder)) != registered:
        raise OSError(
            f"{uri}: the files in {folder} are not those that were registered (sha256 {found[:12]}, registered "
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
    if "@" in rest:
        version = client.get_model_version_by_alias(*rest.rsplit("@", 1))
    elif "/" in rest:
        version = client.get_model_version(*rest.rsplit("/", 1))
    else:
        return client.get_logged_model(rest)
    model_id = version.model_id or version.source.removeprefix("models:/")
    return client.get_logged_model(model_id)


def _download(client: MlflowClient, model: LoggedModel, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{model.model_id}-"))
    try:
        uri = f"{model.artifact_location}/{MODEL_PATH}"
        whole = Path(download_artifacts(artifact_uri=uri, dst_path=str(temporary), tracking_uri=client.tracking_uri))
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
