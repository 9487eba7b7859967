import os
import subprocess
import sys

import pytest

from tasks.environment import Workspace, prepare


def run(code, cwd, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.split()


def test_what_the_user_set_is_kept_and_what_was_chosen_here_follows_the_workspace(tmp_path):
    code = """
import os
from tasks.environment import prepare
for runs in "ab":
    workspace = prepare(runs)
    print(workspace.tracking_uri, os.environ["PREFECT_RESULTS_LOCAL_STORAGE_PATH"], os.environ["VLLM_PLUGINS"])
"""
    clean = {"MLFLOW_TRACKING_URI": "", "PREFECT_RESULTS_LOCAL_STORAGE_PATH": "", "VLLM_PLUGINS": "mine"}
    folders = [tmp_path / "a", tmp_path / "b"]
    expected = [[f"sqlite:///{folder}/mlflow.db", f"{folder}/prefect-results", "mine"] for folder in folders]
    assert run(code, tmp_path, **clean) == expected[0] + expected[1]
    mine = {**clean, "MLFLOW_TRACKING_URI": "http://example.invalid:5000"}
    assert [word for word in run(code, tmp_path, **mine) if "://" in word] == ["http://example.invalid:5000"] * 2
    assert not any(tmp_path.iterdir())


def test_a_value_chosen_here_and_put_back_by_whoever_patched_it_is_still_no_value_of_the_users(tmp_path):
    code = """
import os
from tasks.environment import prepare
prepare("a")
before = dict(os.environ)
del os.environ["MLFLOW_TRACKING_URI"]
prepare("b")
os.environ.update(before)
print(prepare("c").tracking_uri)
"""
    assert run(code, tmp_path, MLFLOW_TRACKING_URI="") == [f"sqlite:///{tmp_path}/c/mlflow.db"]


def test_a_password_leaves_the_address_and_reaches_mlflow(tmp_path):
    code = """
import os
from tasks.environment import prepare
prepare("a")
from mlflow.utils.credentials import get_default_host_creds
given = get_default_host_creds(os.environ["MLFLOW_TRACKING_URI"])
print(given.host, given.username, given.password)
"""
    uri = "https://some%40one:p%2Fss@example.invalid:5000/base"
    cleared = {"MLFLOW_TRACKING_USERNAME": "", "MLFLOW_TRACKING_PASSWORD": ""}
    printed = run(code, tmp_path, MLFLOW_TRACKING_URI=uri, **cleared)
    assert printed == ["https://example.invalid:5000/base", "some@one", "p/ss"]


def test_prefect_reads_what_the_flow_module_prepared(tmp_path):
    code = """
import flows.compress
from prefect.settings import get_current_settings
now = get_current_settings()
print(now.results.local_storage_path, now.server.analytics_enabled, now.server.ephemeral.startup_timeout_seconds)
"""
    clean = dict.fromkeys(
        ("PREFECT_RESULTS_LOCAL_STORAGE_PATH", "PREFECT_SERVER_ANALYTICS_ENABLED", "SLIMGPT_RUNS"), ""
    )
    assert run(code, tmp_path, **clean) == [f"{tmp_path}/runs/prefect-results", "False", "120"]


def test_the_same_request_has_the_same_folder(tmp_path):
    workspace = Workspace.at(tmp_path)
    folder = workspace.run("m", {"model": "x", "ratio": 0.25})
    assert (
        folder == workspace.run("m", {"ratio": 0.25, "model": "x"}) != workspace.run("m", {"model": "x", "ratio": 0.3})
    )
    assert folder.model.is_relative_to(tmp_path)


def test_prepare_uses_the_default_place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLIMGPT_RUNS")
    assert Workspace.at().root == tmp_path / "runs"
    monkeypatch.setenv("SLIMGPT_RUNS", str(tmp_path / "elsewhere"))
    assert Workspace.at().root == tmp_path / "elsewhere"


def test_a_folder_whose_name_a_database_s_url_cannot_hold_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://example.invalid:5000")
    prepare(tmp_path / "why?")  # the database is the server's
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with pytest.raises(ValueError, match=r"runs is '.*why\?'; .*choose a path without \? with --runs or SLIMGPT_RUNS"):
        prepare(tmp_path / "why?")
