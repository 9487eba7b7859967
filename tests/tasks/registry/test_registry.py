import socket
import threading

import pytest

from tasks.environment import Workspace
from tasks.registry.client import open_client
from tasks.registry.fetching import fetch_model
from tasks.registry.names import check_name, default_name, is_model_uri


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
        ("some/folder:odd name/", "folder-odd-name-slim"),
    ],
)
def test_default_names_are_names_that_mlflow_takes(model, name):
    assert default_name(model) == check_name(name) == name


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", " a", "a b", "-a"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="registered model's name has letters"):
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


def test_a_server_that_takes_the_call_and_says_nothing_is_given_up(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        taken: list[socket.socket] = []
        threading.Thread(target=lambda: taken.append(silent.accept()[0]), daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConnectionError, match="does not answer"):
            open_client(Workspace.at(tmp_path))
        for connection in taken:
            connection.close()
