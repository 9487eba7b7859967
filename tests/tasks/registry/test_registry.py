"""Names, URIs and folders of the registry, and what a registry that cannot be used says."""

import contextlib
import re
import socket
import sqlite3
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from mlflow.entities import LoggedModelStatus

from slimgpt.config import EvalConfig
from slimgpt.files import folder_sha256
from tasks.environment import Workspace, is_server
from tasks.preflight.models import resolve
from tasks.preflight.request import check_request
from tasks.registry.client import make_database, open_client
from tasks.registry.config import RegistryConfig
from tasks.registry.experiments import artifact_folder, check_experiment, experiment
from tasks.registry.fetching import fetch_model
from tasks.registry.live_run import open_run
from tasks.registry.names import check_name, default_name, is_model_uri
from tasks.registry.run_content import flat
from tests.tasks.registry import finished_run


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return Workspace.at(tmp_path)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2", "smollm2-slim"),
        ("meta-llama/Llama-2-7b-hf", "Llama-2-7b-hf-slim"),
        ("models:/my-slim@champion", "my-slim"),
        ("models:/my-slim/3", "my-slim"),
        ("runs:/0123abcd", "0123abcd-slim"),
        ("runs:/0123abcd/my-slim", "my-slim"),
        ("some/folder:odd name/", "folder-odd-name-slim"),
        ("模型/小", "model-slim"),
        ("files/gemma-3-270m.gguf", "gemma-3-270m-slim"),
        ("files/gemma-3-270m.GGUF", "gemma-3-270m-slim"),
        (250 * "a", 195 * "a" + "-slim"),
    ],
)
def test_default_names_are_names_that_mlflow_takes(model, name):
    assert default_name(model) == check_name(name) == name


def test_the_default_name_of_a_folder_is_that_of_the_model_in_it(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--Tiny-1B" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert default_name(str(snapshot)) == "Tiny-1B-slim"
    monkeypatch.chdir(snapshot)
    assert default_name(".") == "Tiny-1B-slim"


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", " a", "a b", "-a", 201 * "a"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="registered model's name has (letters|at most 200)"):
        check_name(name)


def test_model_uris():
    assert is_model_uri("models:/a@b")
    assert is_model_uri("runs:/1")
    assert not is_model_uri("org/model")
    assert not is_model_uri("/models/a")
    assert not is_model_uri("smollm2")


@pytest.mark.parametrize("uri", ["models:/only-a-name", "models:/", "elsewhere:/x/1"])
def test_uris_that_name_no_version_are_refused(uri, workspace):
    with pytest.raises(ValueError, match="names no model; use models:/NAME@challenger"):
        fetch_model(uri, workspace)


@pytest.mark.parametrize("uri", ["models:/nobody@challenger", "models:/nobody/1", "runs:/0123", "models:/m-0123"])
def test_what_the_registry_does_not_hold_is_named_in_one_line(uri, workspace):
    with pytest.raises(FileNotFoundError) as error:
        fetch_model(uri, workspace)
    assert uri in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_refuses_is_one_line_without_the_password(monkeypatch, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:s3cret@127.0.0.1:{port}")
    with pytest.raises(ConnectionError) as error:
        open_client(Workspace.at(tmp_path))
    text = str(error.value)
    assert f"MLflow at http://127.0.0.1:{port} does not answer" in text
    assert "unset it" in text
    assert "s3cret" not in text
    assert "someone" not in text
    assert "\n" not in text


@pytest.mark.parametrize("driver", ["", "+asyncpg"])
def test_a_database_that_is_down_is_asked_once(driver, monkeypatch, tmp_path):
    """MLflow tries ten times, with longer and longer pauses, and once more as often for the registry."""
    pytest.importorskip("psycopg2")
    monkeypatch.setattr("mlflow.store.db.utils.time.sleep", pytest.fail)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql{driver}://u:s3cret@127.0.0.1:9/db")
    why = "MLflow takes postgresql://" if driver else "Connection refused"
    with pytest.raises(ConnectionError, match=rf"{re.escape(driver)}://127.0.0.1:9/db does not .*{why}") as error:
        open_client(Workspace.at(tmp_path))
    assert "s3cret" not in str(error.value)


def test_a_server_that_takes_no_requests_under_this_name_says_how_it_would(mlflow_server, monkeypatch, tmp_path):
    find = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: find("127.0.0.1" if host == "mlflow.example" else host, *a, **k)
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://mlflow.example:{mlflow_server.port}")
    with pytest.raises(PermissionError, match=r"mlflow.example:\d+ refuses .*Invalid Host.*--allowed-hosts"):
        open_client(Workspace.at(tmp_path))


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_another_user_names_the_variables(status, monkeypatch, tmp_path):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(PermissionError, match="refuses to answer .*set MLFLOW_TRACKING_USERNAME and"):
            open_client(Workspace.at(tmp_path))
        server.shutdown()


def test_a_server_that_takes_the_call_and_says_nothing_is_given_up(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        taken: list[socket.socket] = []
        threading.Thread(target=lambda: taken.append(silent.accept()[0]), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConnectionError, match="does not answer"):
            open_client(Workspace.at(tmp_path))
        for connection in taken:
            connection.close()


@pytest.mark.parametrize("place", ["my runs", "läufe", "100%20 done"])
def test_a_runs_folder_of_any_name_gives_back_what_it_took(place, tmp_path, monkeypatch):
    """MLflow keeps the experiment's place as a URI, where a blank is %20."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    workspace = Workspace.at(tmp_path / place)
    root = finished_run.make(tmp_path)
    version = finished_run.registered(finished_run.request(root, "tiny-slim"), workspace)
    fetched = fetch_model(version.uri, workspace)
    assert folder_sha256(fetched) == folder_sha256(root / "bundle" / "model")
    assert workspace.root in fetched.parents
    assert artifact_folder(open_client(workspace), "slimgpt", workspace) == workspace.mlflow_artifacts
    assert [path.name for path in tmp_path.iterdir() if "%" in path.name and path.name != place] == []


def test_a_model_by_its_id_is_called_by_the_version_that_holds_it(workspace, tmp_path):
    version = finished_run.registered(finished_run.request(finished_run.make(tmp_path), "tiny-slim"), workspace)
    for uri in ("models:/tiny-slim/1", f"runs:/{version.run_id}", f"models:/{version.model_id}"):
        assert resolve.fn(uri, "", workspace).label == "tiny-slim@1"
    open_client(workspace).delete_model_version("tiny-slim", "1")
    assert resolve.fn(f"runs:/{version.run_id}", "", workspace).label == version.run_id


def test_no_path_of_this_machine_is_among_the_parameters():
    texts = {"one": "/a/x.txt", "two": "/a/x.txt:0.5,/b/y.txt:0.5", "mixed": "c4,/home/me/notes.txt:0.2", "hub": "o/n"}
    read = flat({"prune": texts, "models": ["/a/x", "/b/y"], "ratios": (0.2, 0.5), "ratio": 0.25})
    assert read == {
        **{"prune.one": "x.txt", "prune.two": "x.txt:0.5,y.txt:0.5", "prune.mixed": "c4,notes.txt:0.2"},
        **{"prune.hub": "o/n", "models": "['x', 'y']", "ratios": "[0.2, 0.5]", "ratio": "0.25"},
    }


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_that_ends_with_the_command_is_refused(tmp_path, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ValueError, match=f"MLFLOW_TRACKING_URI is {uri}, a database that ends with this command; name"):
        open_client(Workspace.at(tmp_path))


def test_a_server_is_one_in_capitals_too():
    assert is_server("HTTP://127.0.0.1:5000") and is_server("https://mlflow.example.org")
    assert not is_server("sqlite:///mlflow.db")


def test_an_experiment_that_was_deleted_is_said_before_any_work(workspace):
    client = open_client(workspace)
    client.delete_experiment(experiment(client, "slimgpt", workspace))
    words = "'slimgpt' was deleted and takes no runs: restore it .*--experiment-id 1"
    with (
        pytest.raises(ValueError, match=words),
        open_run("tiny-slim", {}, RegistryConfig(), workspace, workspace.run("tiny-slim", {})),
    ):
        pytest.fail("the work has begun")
    with pytest.raises(ValueError, match=words):  # sooner, before engines are measured for a target in speed
        check_request.fn("tiny-slim", EvalConfig(), workspace, ("evaluate", "benchmark"), "slimgpt")


def test_a_runs_folder_that_was_moved_is_said_and_not_made_anew(tmp_path, monkeypatch):
    """MLflow's database knows the old place alone, would make it again, and store the next model there."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    old, new = tmp_path / "old", tmp_path / "new"
    request = finished_run.request(finished_run.make(tmp_path), "tiny-slim")
    version = finished_run.registered(request, Workspace.at(old))
    old.rename(new)
    with pytest.raises(FileNotFoundError, match=rf"{version.uri} were stored in {old}.*was moved, make a link"):
        fetch_model(version.uri, Workspace.at(new))
    with pytest.raises(FileNotFoundError, match=rf"'slimgpt' keeps its files in {old}.*was moved, make a link"):
        check_request.fn("tiny-slim", EvalConfig(), Workspace.at(new), ("evaluate", "benchmark"), "slimgpt")
    assert not old.exists()
    old.symlink_to(new)
    assert new / "mlflow-artifacts" in fetch_model(version.uri, Workspace.at(new)).resolve().parents
    assert finished_run.registered(request, Workspace.at(new)).version == "2"


def test_files_that_a_server_keeps_are_not_reached_by_its_database_alone(workspace):
    """As after `make up`, `make down`, and a command that finds the database in the same folder of runs."""
    client = open_client(workspace)
    place = client.create_experiment("slimgpt", "mlflow-artifacts:/1")
    words = "keeps its files with an MLflow server, and sqlite:.* is a database alone: start the server .make up. and"
    with pytest.raises(FileNotFoundError, match=f"experiment 'slimgpt' {words}"):
        check_request.fn("tiny-slim", EvalConfig(), workspace, ("evaluate", "benchmark"), "slimgpt")
    model_id = client.create_logged_model(place, "model").model_id
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    with pytest.raises(FileNotFoundError, match=f"models:/{model_id} {words}"):
        fetch_model(f"models:/{model_id}", workspace)


def test_a_server_whose_files_lie_in_a_folder_of_its_own_machine_is_refused(served_workspace, tmp_path, monkeypatch):
    """As with --default-artifact-root: clients write there themselves, here to a folder that no server looks into."""
    client = open_client(served_workspace)
    client.create_experiment("far", (tmp_path / "elsewhere" / "1").as_uri())
    assert check_experiment(client, "far")  # the server's machine is this one, and the folder is made with a file
    monkeypatch.setattr("tasks.registry.experiments._OWN_HOSTS", ())
    with (
        pytest.raises(FileNotFoundError, match=r"there is no .*elsewhere here: .*--artifacts-destination in place of"),
        open_run("tiny-slim", {}, RegistryConfig(experiment="far"), served_workspace, served_workspace.run("x", {})),
    ):
        pytest.fail("the work has begun")
    assert not (tmp_path / "elsewhere").exists()


def test_the_name_of_a_prompt_is_refused_before_any_work(workspace):
    open_client(workspace).register_prompt("tiny-slim", "Say {{this}}.")
    with pytest.raises(ValueError, match="tiny-slim is the name of a prompt in MLflow"):
        check_request.fn("tiny-slim", EvalConfig(), workspace, ("evaluate", "benchmark"), "slimgpt")
    check_request.fn("tiny-slim-2", EvalConfig(), workspace, ("evaluate", "benchmark"), "slimgpt")


def test_the_experiment_default_stores_its_artifacts_where_the_others_do(tmp_path, monkeypatch):
    """MLflow makes it with the tables, by itself for the folder it was started in."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    workspace = Workspace.at(tmp_path / "größe 1")
    client = open_client(workspace)
    default, own = (
        client.get_experiment(experiment(client, name, workspace)).artifact_location for name in ("Default", "slimgpt")
    )
    assert default == f"{own}/0" == f"{workspace.mlflow_artifacts.as_uri()}/0"


def test_a_database_of_another_version_is_said_with_mlflows_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    workspace = Workspace.at(tmp_path)
    make_database(workspace.tracking_uri, workspace.mlflow_artifacts.as_uri())
    with contextlib.closing(sqlite3.connect(workspace.mlflow_database)) as database, database:
        database.execute("update alembic_version set version_num = '0123456789ab'")
    with pytest.raises(ConnectionError) as refused:
        open_client(workspace)
    message = str(refused.value)
    assert f"MLflow's database sqlite:///{workspace.mlflow_database} cannot be used (" in message
    assert "mlflow db upgrade" in message and "start it" not in message
    assert "\n" not in message
