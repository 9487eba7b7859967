"""PostgreSQL and a bucket, made and named as docs/flows.md says."""

import re
import shlex
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.team_servers import PASSWORD, Bucket, Postgres, postgres_missing

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs/flows.md").read_text().split("## PostgreSQL and S3")[1].split("\n## ")[0]
LINES = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", SECTION, flags=re.DOTALL)
    for line in block.splitlines()
]


@pytest.fixture(scope="session")
def postgres():
    if postgres_missing():
        pytest.skip(postgres_missing())
    with Postgres("planted0admin") as postgres:
        for sudo, _, user, *command in (words for words in LINES if words[0] == "sudo"):
            assert (sudo, user) == ("sudo", "postgres")
            postgres.run(*command, typed=f"{PASSWORD}\n{PASSWORD}\n")
        yield postgres


@pytest.fixture(scope="session")
def bucket():
    with Bucket("slimgpt") as bucket:
        yield bucket


@pytest.fixture(scope="session")
def variables(postgres, bucket):
    """The lines of team.env, with this machine's places and planted words for the docs' ones."""
    places = {
        "PASSWORD": quote(PASSWORD, safe=""),
        "db.example.org:5432": f"127.0.0.1:{postgres.port}",
        "https://s3.example.org": bucket.url,
        "=KEY": f"={bucket.writer['AWS_ACCESS_KEY_ID']}",
        "=SECRET": f"={bucket.writer['AWS_SECRET_ACCESS_KEY']}",
    }
    settings = [words[1] for words in LINES if words[0] == "export"]
    for before, after in places.items():
        assert any(before in setting for setting in settings)
        settings = [setting.replace(before, after) for setting in settings]
    return dict(setting.split("=", 1) for setting in settings)
