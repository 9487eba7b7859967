"""What flows.local.stores says of databases and buckets that cannot be used: tried on real ones."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from flows.local import stores
from tests.team_servers import PASSWORD, free_port

ROOT = Path(__file__).parents[3]
PREFECT, DATABASE = stores.DATABASE["prefect"][0], stores.DATABASE["mlflow"][0]
WRONG = {
    "no database there": (
        {DATABASE: "postgresql+psycopg2://someone:planted0@127.0.0.1:FREE/mlflow"},
        OSError,
        f"{DATABASE}: postgresql.psycopg2://someone@127.0.0.1:FREE/mlflow cannot be used .*Connection refused.*; start",
    ),
    "no database there, Prefect's": (
        {PREFECT: "postgresql+asyncpg://someone:planted0@127.0.0.1:FREE/prefect"},
        OSError,
        f"{PREFECT}: postgresql.asyncpg://someone@127.0.0.1:FREE/prefect cannot be used .*Connect call failed.*; start",
    ),
    "a wrong password": (
        {DATABASE: "postgresql+psycopg2://slimgpt:planted0x@127.0.0.1:PORT/mlflow"},
        OSError,
        'cannot be used .*password authentication failed for user "slimgpt".*; start the database, correct',
    ),
    "a wrong password, Prefect's old name": (
        {PREFECT: "", stores.DATABASE["prefect"][1]: "postgresql+asyncpg://slimgpt:planted0x@127.0.0.1:PORT/prefect"},
        OSError,
        'PREFECT_API_DATABASE_CONNECTION_URL: .*password authentication failed for user "slimgpt"',
    ),
    "a database that there is not": (
        {PREFECT: "postgresql+asyncpg://slimgpt:WORD@127.0.0.1:PORT/nothing"},
        OSError,
        'cannot be used .*database "nothing" does not exist',
    ),
    "somebody else's database": (
        {DATABASE: "postgresql+psycopg2://slimgpt:WORD@127.0.0.1:PORT/postgres"},
        OSError,
        "slimgpt may not create tables in .*/postgres; ALTER DATABASE postgres OWNER TO slimgpt",
    ),
    "one database for both": (
        {DATABASE: "postgresql+psycopg2://slimgpt:WORD@127.0.0.1:PORT/prefect"},
        ValueError,
        f"{DATABASE} and {PREFECT} name one database .prefect.*; make two databases",
    ),
    "a driver that is not installed": (
        {DATABASE: "postgresql+psycopg://slimgpt:WORD@127.0.0.1:PORT/mlflow"},
        ValueError,
        "begins with postgresql.psycopg:// and needs psycopg, which is not installed; begin it with postgresql.psycopg2://",
    ),
    "a scheme that SQLAlchemy does not know": (
        {DATABASE: "postgres://slimgpt:WORD@127.0.0.1:PORT/mlflow"},
        ValueError,
        "begins with postgres:// and needs a driver, which is not installed; begin it with postgresql.psycopg2://",
    ),
    "MLflow's driver for Prefect": (
        {PREFECT: "postgresql+psycopg2://slimgpt:WORD@127.0.0.1:PORT/prefect"},
        ValueError,
        f"{PREFECT} begins with postgresql.psycopg2://; Prefect takes postgresql.asyncpg:// only",
    ),
    "a password as it is typed": (
        {DATABASE: "postgresql+psycopg2://slimgpt:x@planted0@127.0.0.1:PORT/mlflow"},
        ValueError,
        f"{DATABASE} cannot be read; write @ in user and password as %40",
    ),
    "half a URL": (
        {DATABASE: "postgresql+psycopg2://slimgpt:planted0@127.0.0.1:port/mlflow"},
        ValueError,
        f"{DATABASE} cannot be read; write postgresql.psycopg2://USER:PASSWORD@HOST/DATABASE",
    ),
    "no bucket": (
        {stores.ARTIFACTS: "s3://nothing/here"},
        OSError,
        r"MLFLOW_ARTIFACTS_DESTINATION: s3://nothing/here cannot be used \(.*NoSuchBucket.*; make the bucket, give",
    ),
    "no S3 server": (
        {"MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:FREE"},
        OSError,
        "s3://slimgpt/mlflow cannot be used .Could not connect to the endpoint URL.*correct MLFLOW_S3_ENDPOINT_URL",
    ),
    "wrong keys": (
        {"AWS_SECRET_ACCESS_KEY": "planted0"},
        OSError,
        r"s3://slimgpt/mlflow cannot be used \(.*SignatureDoesNotMatch.*give AWS_ACCESS_KEY_ID the right to put",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_work_is_said_in_one_line_without_passwords(wrong, postgres, variables, monkeypatch):
    changed, kind, message = WRONG[wrong]
    places = {":WORD@": f":{quote(PASSWORD, safe='')}@", "PORT": str(postgres.port), "FREE": str(free_port())}
    for before, after in places.items():
        changed = {name: value.replace(before, after) for name, value in changed.items()}
        message = message.replace(before, after)
    for name, value in {**variables, **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(kind, match=message) as error:
        stores.check(["prefect", "mlflow"])
    assert len(str(error.value).splitlines()) == 1
    assert "planted0" not in str(error.value)


def test_keys_that_only_read_are_refused(bucket, variables, monkeypatch):
    for name, value in {**variables, **bucket.reader}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match=r"cannot be used \(.*AccessDenied.*PutObject.*give AWS_ACCESS_KEY_ID the right"):
        stores.check(["mlflow"])


def test_a_driver_or_boto3_that_is_missing_is_named(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for module, variable in (("psycopg2", DATABASE), ("boto3", stores.ARTIFACTS)):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            with pytest.raises(ValueError, match=rf"{variable} .* needs {module}.*pip install 'slimgpt\[team\]'"):
                stores.check(["mlflow"])


def test_a_database_as_tracking_uri_is_refused_before_anything_starts(tmp_path):
    tracking = "postgresql+psycopg2://slimgpt:planted0@db.example.org/mlflow"
    environment = {**os.environ, "SLIMGPT_RUNS": str(tmp_path), "MLFLOW_TRACKING_URI": tracking}
    command = [sys.executable, "-m", "flows.local", "up"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: MLFLOW_TRACKING_URI begins with postgresql+psycopg2://; put a database into {DATABASE} instead\n",
    )
    assert not list(tmp_path.rglob("*.json"))
