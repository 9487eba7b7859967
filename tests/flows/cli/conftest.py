"""The command line in this process, and a tiny model."""

import sys

import pytest

from flows.cli import app as cli
from tests.tiny_models import write_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def slimgpt(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["slimgpt", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
