"""A client of MLflow that responds within seconds, its errors in one line, a local database, aliases."""

import contextlib
import errno
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry.prompt_version import IS_PROMPT_TAG_KEY
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from requests import RequestException
from sqlalchemy import NullPool, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from tasks.environment import Workspace, is_server, prepare
from tasks.messages import reason, without_password

_FULL, _FULL_DATABASE = os.strerror(errno.ENOSPC), "database or disk is full"  # SQLite's words
_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_CONNECT_LIMIT = dict.fromkeys(("psycopg2", "psycopg", "pymysql", "mysqldb"), "connect_timeout")  # driver -> option
_REMEDY_OF_HOST = (
    "it takes requests under certain names alone: name it in MLFLOW_TRACKING_URI as it expects, "
    "or start it with --allowed-hosts (MLFLOW_SERVER_ALLOWED_HOSTS) that include this name"
)
_REFUSED = re.compile(r"error code (401|403)\b")  # of the server, by HTTP
_REMEDY_OF_USER = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_impatience = threading.Lock()
_impatient_blocks: list[dict[str, str | None]] = []  # of all threads, each with the values before the first


def open_client(workspace: Workspace) -> MlflowClient:
    """A client of the tracking server (``MLFLOW_TRACKING_URI``) or of the workspace's SQLite file, checked to answer.

    Raises:
        ConnectionError: when the server does not answer within seconds.
        PermissionError: when it answers that it is not to be asked: by this user, or under this name of its host.
        OSError: when the SQLite file cannot be opened.
    """
    prepare(workspace.root)
    # Tables made on the first use, an input example that fits, a file of uv's that is not looked for: no news.
    for chatty in ("mlflow.store.db.utils", "alembic", "mlflow.pyfunc", "mlflow.utils.uv_utils"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    uri = workspace.tracking_uri
    make_database(uri, workspace.mlflow_artifacts.as_uri())
    try:
        with impatient():
            _reach_database(uri)
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # MLflow, requests, SQLAlchemy: whatever it is, the server cannot be used
        why = f"({reason(error, uri)})"
        if uri.startswith("sqlite:"):
            raise ConnectionError(f"MLflow's database {uri} cannot be used {why}") from None
        if _REFUSED.search(str(error)):
            remedy = _REMEDY_OF_HOST if "Invalid Host" in str(error) else _REMEDY_OF_USER
            raise PermissionError(f"MLflow at {without_password(uri)} refuses to answer {why}; {remedy}") from None
        raise ConnectionError(
            f"MLflow at {without_password(uri)} does not answer {why}; "
            "start it, correct MLFLOW_TRACKING_URI, or unset it to use a local SQLite file"
        ) from None
    return client


def _reach_database(uri: str) -> None:
    """Connect once where ``uri`` names a database server: MLflow itself tries for 51 s, and once more as long."""
    scheme = uri.partition(":")[0]
    if scheme.partition("+")[0] not in DATABASE_ENGINES or scheme.startswith("sqlite"):
        return
    url = make_url(uri)
    if url.get_dialect().is_async:
        raise ValueError(f"{scheme}:// is for programs such as Prefect; MLflow takes {url.get_backend_name()}://")
    limit = _CONNECT_LIMIT.get(url.get_driver_name())
    with create_engine(url, poolclass=NullPool, connect_args={limit: 10} if limit else {}).connect():
        pass


def make_database(uri: str, artifacts: str) -> None:
    """Make MLflow's tables, all or none: MLflow takes a hundred steps, and cannot go on where it was killed in them.

    Args:
        uri: nothing is done unless it names an SQLite file that does not exist.
        artifacts: URI under which the experiment Default, which MLflow makes with the tables, stores its artifacts; by
            itself MLflow takes the current folder.

    Raises:
        OSError: when there can be no such file.
        ValueError: for a database in memory.
    """
    if not uri.startswith("sqlite:"):
        return
    if (database := make_url(uri).database) in (None, "", ":memory:"):
        raise ValueError(f"MLFLOW_TRACKING_URI is {uri}, a database that ends with this command; name its file")
    if (file := Path(database)).exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as temporary:
            made = Path(temporary) / file.name
            SqlAlchemyStore(f"sqlite:///{made}", artifacts).engine.dispose()
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
    with _impatience:
        before = _impatient_blocks[0] if _impatient_blocks else {name: os.environ.get(name) for name in _LIMITS}
        _impatient_blocks.append(before)
        os.environ.update(_LIMITS)
    try:
        yield
    finally:
        with _impatience:
            _impatient_blocks.pop()
            if not _impatient_blocks:  # the last of all threads
                for name, value in before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


@contextlib.contextmanager
def explained(doing: str, stays: str, workspace: Workspace) -> Iterator[None]:
    """Turn what MLflow and the disk raise in the block into one line for the user.

    Args:
        doing: what failed, as in "MLflow failed while ...".
        stays: what is left as it was.
        workspace: of the registry.

    Raises:
        ConnectionError: when the server stops answering.
        PermissionError: when it answers that this user may not do that.
        OSError: when the disk is full; the message says of what.
    """
    try:
        yield
    except (MlflowException, RequestException) as error:
        raise _explanation(doing, stays, workspace, error) from None
    except OSError as error:  # of its own, where files and database are folders of this machine
        if _FULL not in str(error):
            raise
        raise _explanation(doing, stays, workspace, error) from None


def _explanation(doing: str, stays: str, workspace: Workspace, error: Exception) -> OSError:
    """The error for the user: a server that failed may be back in a minute, a disk that is full is not."""
    why = f"while {doing} ({reason(error, workspace.tracking_uri)})"
    served = is_server(workspace.tracking_uri)
    if not served and any(words in str(error) for words in (_FULL, _FULL_DATABASE)):
        return OSError(
            f"the disk of {workspace.root} became full {why}; {stays}: make room there, or leave the weights where "
            "they are (registry.weights reference), and run this again"
        )
    if _REFUSED.search(str(error)):
        return PermissionError(
            f"MLflow refused {why}; {stays}: ask for the right, or {_REMEDY_OF_USER} of a user with it"
        )
    return ConnectionError(f"MLflow failed {why}; {stays}: run this again when MLflow is back")


def check_registrable(client: MlflowClient, name: str) -> None:
    """Refuse a name under which MLflow would register no model.

    Raises:
        ValueError: when a prompt has it: MLflow keeps both in one list.
    """
    if client.search_registered_models(f"name = '{name}' and tags.`{IS_PROMPT_TAG_KEY}` = 'true'", max_results=1):
        raise ValueError(f"{name} is the name of a prompt in MLflow, so no model can have it; choose another --name")


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
