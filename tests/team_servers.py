"""What a team keeps its state in, on loopback: Debian's PostgreSQL, and moto's S3 server, which asks for keys."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import boto3
import psycopg2
import requests
from moto.server import ThreadedMotoServer

PASSWORD = "planted0/wo:rd@%"  # of the servers' role: a word to look for, and what a URL must escape
BINARIES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


def postgres_missing() -> str:
    """Why PostgreSQL cannot run here; empty where it can."""
    if BINARIES is None or not (BINARIES / "initdb").is_file():
        return "no PostgreSQL here (Debian's package postgresql)"
    if os.getuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}:
        return "PostgreSQL does not run as root, and there is no user postgres"
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Postgres:
    """A cluster in a folder of its own, with a password for everybody; ``with`` starts and ends it."""

    def __init__(self, admin_password: str) -> None:
        self.admin_password = admin_password
        self.port = free_port()
        # Not in pytest's folders: root's are closed to the user that PostgreSQL runs as.
        self.folder = Path(tempfile.mkdtemp(prefix="slimgpt-postgres-"))
        self.user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}

    def __enter__(self) -> "Postgres":
        word = self.folder / "password"
        word.write_text(self.admin_password)
        if self.user:
            for path in (self.folder, word):
                shutil.chown(path, "postgres", "postgres")
        data = self.folder / "data"
        make = ["initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", "--pwfile", word, "--no-sync"]
        self.run(*make, "-E", "UTF8", "--no-locale")
        word.unlink()
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("wb") as log:
            command = [BINARIES / "postgres", "-D", data, *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd="/", **self.user)
        while True:  # pytest's own time limit bounds it
            assert self.process.poll() is None, (self.folder / "log").read_text()
            try:
                self.connect("postgres").close()
                return self
            except psycopg2.OperationalError:
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        shutil.rmtree(self.folder)

    def connect(self, database: str):
        connection = psycopg2.connect(
            host="127.0.0.1", port=self.port, dbname=database, user="postgres", password=self.admin_password
        )
        connection.autocommit = True
        return connection

    def ask(self, database: str, query: str) -> list[tuple[object, ...]]:
        connection = self.connect(database)
        with connection.cursor() as cursor:
            cursor.execute(query)
            rows = cursor.fetchall() if cursor.description else []
        connection.close()
        return rows

    def dump(self, database: str) -> str:
        """Every row of every table."""
        return self.run("pg_dump", "--data-only", "--inserts", database)

    def run(self, program: str, *arguments: object, typed: str = "") -> str:
        """One of PostgreSQL's programs as its administrator, who types ``typed``."""
        command = [str(word) for word in (BINARIES / program, *arguments)]
        place = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "postgres"}
        environment = {"PATH": os.environ["PATH"], **place, "PGPASSWORD": self.admin_password}
        # A session of its own: without a terminal the programs read passwords from their input.
        own = {"cwd": "/", "env": environment, "start_new_session": True, **self.user}
        done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120, **own)
        assert done.returncode == 0, done.stderr
        return done.stdout


class Bucket:
    """A bucket on a server of its own, whose users each have keys; ``with`` starts and ends it.

    ``writer`` and ``reader`` are boto3's variables for one who may do all there, and for one who may only read.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)

    def __enter__(self) -> "Bucket":
        self.server.start()
        host, port = self.server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self._client("s3").create_bucket(Bucket=self.name)
        self.writer = self._user("writer", "s3:*")
        self.reader = self._user("reader", "s3:GetObject", "s3:ListBucket")
        # From here on it refuses what is not signed, or not allowed.
        requests.post(f"{self.url}/moto-api/reset-auth", data=b"0", timeout=60).raise_for_status()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def contents(self) -> dict[str, bytes]:
        """All that lies there, by key."""
        client = self._client("s3", **{name.lower(): value for name, value in self.writer.items()})
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        names = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {name: client.get_object(Bucket=self.name, Key=name)["Body"].read() for name in names}

    def _user(self, name: str, *actions: str) -> dict[str, str]:
        iam = self._client("iam")
        iam.create_user(UserName=name)
        statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=name, PolicyName="rights", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def _client(self, service: str, **keys: str):
        anybody = {"aws_access_key_id": "anybody", "aws_secret_access_key": "anybody"}
        return boto3.client(service, region_name="us-east-1", endpoint_url=self.url, **(anybody | keys))
