"""Where the local servers keep their state: the runs folder, or for a team PostgreSQL and an S3-compatible store.

The variables are those that Prefect, MLflow and boto3 read. They are tried before a server starts, which would end with
a long trace otherwise. Passwords are in no message, and no process but the server they are meant for is given them.
"""

import asyncio
import contextlib
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from sqlalchemy import URL

ARTIFACTS = "MLFLOW_ARTIFACTS_DESTINATION"
ENDPOINT = "MLFLOW_S3_ENDPOINT_URL"
CONNECT_TIMEOUT_S = 10
# Each server's variables for its database: the first that is set counts. The second is Prefect's old name.
DATABASE = {
    "prefect": ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"),
    "mlflow": ("MLFLOW_BACKEND_STORE_URI",),
}
_PRIVATE = {
    "prefect": ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_"),
    "mlflow": ("MLFLOW_BACKEND_STORE_URI", ARTIFACTS, "MLFLOW_S3_", "AWS_"),
}
_DRIVERS = {"prefect": "postgresql+asyncpg", "mlflow": "postgresql+psycopg2"}
_TIMEOUT = {"asyncpg": "timeout", "psycopg2": "connect_timeout", "psycopg": "connect_timeout"}
# Either the tables are there, or they can be made: since PostgreSQL 15 the right of the database's owner alone.
_MAY_MAKE_TABLES = """select to_regclass('alembic_version') is not null or coalesce(
    has_database_privilege(current_database(), 'CREATE') and has_schema_privilege(current_schema(), 'CREATE'), false)"""


def environment_of(service: str, servers: Collection[str], environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without what is only for others: a flow run needs neither a database nor the bucket's keys.

    Args:
        service: prefect, mlflow or worker.
        servers: those that are started here. One that runs elsewhere has its secrets there, and what is set here
            may be meant for its clients.
        environment: of all of them.
    """
    hidden = tuple(prefix for server in servers if server != service for prefix in _PRIVATE[server])
    return {name: value for name, value in environment.items() if not name.startswith(hidden)}


def on_server(service: str) -> bool:
    """Whether its database is on a server, which other machines may use as well."""
    return _parsed(*_database(service)) is not None


def described(service: str) -> str:
    """Where its state is, for people: without passwords; empty for the worker, which has none."""
    if service not in DATABASE:
        return ""
    try:
        url = _parsed(*_database(service))
        places = [_shown(url) if url is not None else "SQLite"]
    except ValueError:  # said by check(), which `down` does not need
        places = ["a database whose URL cannot be read"]
    if service == "mlflow":
        places.append(os.environ.get(ARTIFACTS, "") or "files")
    return " and ".join(places)


def check(servers: Collection[str]) -> None:
    """Try the stores of servers that are about to start.

    Raises:
        ValueError: for what cannot be right, and for a driver that is not installed.
        OSError: for a database or a bucket that cannot be reached or written.
    """
    used: dict[tuple[Any, ...], str] = {}
    for service in DATABASE:
        variable, text = _database(service)
        url = _parsed(variable, text)
        if url is None:
            continue
        place = (url.host, url.port, url.database, url.query.get("options"))
        if place in used:
            raise ValueError(
                f"{variable} and {used[place]} name one database ({url.database}), and both servers keep a table "
                "alembic_version; make two databases"
            )
        used[place] = variable
        if service not in servers:
            continue
        if service == "prefect" and url.drivername != _DRIVERS[service]:
            raise ValueError(f"{variable} begins with {url.drivername}://; Prefect takes {_DRIVERS[service]}:// only")
        _try_database(variable, url, _DRIVERS[service])
    if "mlflow" in servers and os.environ.get(ARTIFACTS, "").startswith("s3:"):
        _try_bucket(os.environ[ARTIFACTS])


def check_tracking_uri(uri: str) -> None:
    """Refuse a database as MLFLOW_TRACKING_URI: a server that is started here would not use it.

    Raises:
        ValueError: when it is one.
    """
    scheme, separator, _ = uri.partition("://")
    if separator and not scheme.startswith(("http", "sqlite", "file")):
        variable = DATABASE["mlflow"][0]
        raise ValueError(f"MLFLOW_TRACKING_URI begins with {scheme}://; put a database into {variable} instead")


def _database(service: str) -> tuple[str, str]:
    """(variable, URL); the URL is empty where none is set."""
    names = DATABASE[service]
    variable = next((name for name in names if os.environ.get(name)), names[0])
    text = os.environ.get(variable, "")
    for prefix in _PRIVATE["prefect"]:  # as Prefect's settings do
        word = f"{prefix}PASSWORD"
        text = text.replace(f"${{{word}}}", os.environ.get(word, ""))
    return variable, text


def _parsed(variable: str, text: str) -> "URL | None":
    """The URL of a database server; None for a file."""
    scheme, separator, _ = text.partition("://")
    if not separator or scheme.startswith(("sqlite", "file")):
        return None
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(f"{variable} cannot be read; write {scheme}://USER:PASSWORD@HOST/DATABASE") from None
    if "@" in f"{url.host}{url.database}":  # and messages would show a part of the password as the host
        raise ValueError(f"{variable} cannot be read; write @ in user and password as %40, / as %2F, : as %3A")
    return url


def _shown(url: "URL") -> str:
    place = f"{url.host or 'localhost'}{f':{url.port}' if url.port else ''}/{url.database or ''}"
    return f"{url.drivername}://{f'{url.username}@' if url.username else ''}{place}"


def _try_database(variable: str, url: "URL", driver: str) -> None:
    from sqlalchemy.exc import NoSuchModuleError

    try:
        allowed = asyncio.run(_ask_async(url)) if url.get_dialect().is_async else _ask(url)
    except (ImportError, NoSuchModuleError) as error:
        missing = getattr(error, "name", "") or "a driver"
        raise ValueError(
            f"{variable} begins with {url.drivername}:// and needs {missing}, which is not installed; "
            f"begin it with {driver}:// (pip install 'slimgpt[team]')"
        ) from None
    except Exception as error:  # SQLAlchemy's, a driver's, the network's: the server would end with it
        raise OSError(
            f"{variable}: {_shown(url)} cannot be used ({_reason(error, str(url.password or ''))}); "
            "start the database, correct the variable, or unset it to use SQLite"
        ) from None
    if not allowed:
        raise OSError(
            f"{variable}: {url.username} may not create tables in {_shown(url)}; "
            f"ALTER DATABASE {url.database} OWNER TO {url.username}"
        )


def _question(url: "URL") -> str:
    return _MAY_MAKE_TABLES if url.get_backend_name() == "postgresql" else "select 1"


def _arguments(url: "URL") -> dict[str, Any]:
    name = _TIMEOUT.get(url.get_driver_name())
    return {name: CONNECT_TIMEOUT_S} if name else {}


def _ask(url: "URL") -> bool:
    from sqlalchemy import NullPool, create_engine, text

    with create_engine(url, poolclass=NullPool, connect_args=_arguments(url)).connect() as connection:
        return bool(connection.execute(text(_question(url))).scalar())


async def _ask_async(url: "URL") -> bool:
    from sqlalchemy import NullPool, text
    from sqlalchemy.ext.asyncio import create_async_engine

    async with create_async_engine(url, poolclass=NullPool, connect_args=_arguments(url)).connect() as connection:
        return bool((await connection.execute(text(_question(url)))).scalar())


def _reason(error: Exception, password: str) -> str:
    cause = getattr(error, "orig", None) or error
    line = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
    return line.replace(password, "***") if password else line


def _try_bucket(destination: str) -> None:
    """Put, get and list, as MLflow does."""
    try:
        import boto3
    except ImportError:
        raise ValueError(f"{ARTIFACTS} is {destination} and needs boto3; pip install 'slimgpt[team]'") from None
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(destination)
    folder = f"{parts.path.strip('/')}/".lstrip("/")
    probe = {"Bucket": parts.netloc, "Key": f"{folder}.slimgpt-probe"}
    try:
        client = boto3.Session().client(
            "s3",
            endpoint_url=os.environ.get(ENDPOINT) or None,
            verify=False if os.environ.get("MLFLOW_S3_IGNORE_TLS", "").lower() in ("true", "1") else None,
            config=Config(
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=CONNECT_TIMEOUT_S,
                retries={"total_max_attempts": 2},
                s3={"addressing_style": os.environ.get("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE") or "auto"},
            ),
        )
        client.put_object(**probe, Body=b"")
        client.get_object(**probe)
        client.list_objects_v2(Bucket=parts.netloc, Prefix=folder, MaxKeys=1)
        with contextlib.suppress(ClientError):  # a store that keeps everything; the next probe overwrites this one
            client.delete_object(**probe)
    except (BotoCoreError, ClientError, ValueError) as error:
        reason = _reason(error, os.environ.get("AWS_SECRET_ACCESS_KEY", ""))
        raise OSError(
            f"{ARTIFACTS}: {destination} cannot be used ({reason}); make the bucket, give AWS_ACCESS_KEY_ID the right "
            f"to put, get and list there, or correct {ENDPOINT}"
        ) from None
