"""Registration on real registries: what a run and a version hold, what goes wrong on the way, and what is kept out."""

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
import requests
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from packaging.requirements import Requirement
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL
from transformers import AutoTokenizer

import slimgpt
from deploy.bundle.folder import write_bundle
from flows.cli.app import main
from slimgpt.checkpoints.lineage import Checkpoint, load_lineage
from slimgpt.checkpoints.loading import load_causal_lm
from slimgpt.config import QuantizeConfig
from slimgpt.engine.pruner import prune
from slimgpt.files import folder_sha256
from slimgpt.quantization.packages import missing_packages
from slimgpt.quantization.quantizer import quantize
from tasks.environment import Workspace
from tasks.registry import versions
from tasks.registry.client import open_client
from tasks.registry.config import RegistryConfig
from tasks.registry.fetching import fetch_model
from tasks.registry.gates import GateConfig
from tasks.registry.live_run import open_run
from tasks.registry.promotion import promote
from tasks.steps.registration import register
from tests import processes
from tests.tasks.registry import finished_run

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run.make(tmp_path_factory.mktemp("finished"))


def registered(run, workspace, name="tiny-slim", **rest):
    return finished_run.registered(finished_run.request(run, name, **rest), workspace)


def test_a_checkout_that_is_not_installed_registers_too(run, workspace, monkeypatch):
    """On PYTHONPATH, as `make up` has it; where another one is installed, that one's version is not ours."""
    find = importlib.metadata.distribution

    def without_ours(name):
        if name == "slimgpt":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without_ours)
    version = registered(run, workspace)
    tags = open_client(workspace).get_model_version(version.name, version.version).tags
    assert tags["version.slimgpt"] == slimgpt.__version__


def test_a_run_on_a_server_holds_everything_and_the_version_loads_back(run, served_workspace):
    config = RegistryConfig(experiment="team", run_name="first try")
    version = registered(run, served_workspace, config=config)
    client = open_client(served_workspace)
    parent = client.get_run(version.run_id)
    assert client.get_experiment(parent.info.experiment_id).name == "team"
    assert (parent.info.run_name, parent.info.status) == ("first try", "FINISHED")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert parent.data.tags["mlflow.source.git.commit"] == head.stdout.strip()
    assert {"device", "version.torch", "version.slimgpt", "mlflow.user", "perplexity"} <= set(parent.data.tags)
    assert parent.data.params["evaluation.max_blocks"] == "2"
    contexts = {(item.dataset.name, item.tags[0].value) for item in parent.inputs.dataset_inputs}
    assert contexts == {("python", "calibration"), ("python", "evaluation")}
    children = client.search_runs(
        [parent.info.experiment_id],
        f"tags.mlflow.parentRunId = '{version.run_id}' and params.`evaluation.max_blocks` = '2'",
    )
    sides = {child.data.tags["side"]: child for child in children}
    assert set(sides) == {"dense", "pruned"}
    for side, child in sides.items():
        assert child.info.status == "FINISHED"
        assert child.data.metrics["python/perplexity"] == parent.data.metrics[f"{side}/python/perplexity"]
    assert sides["pruned"].data.metrics["parameters"] < sides["dense"].data.metrics["parameters"]

    kept = client.get_model_version("tiny-slim", version.version)
    assert kept.status == "READY"
    assert kept.tags["ratio"].startswith("0.2") and kept.tags["base_model"] == "tiny"
    assert kept.tags["perplexity"] == f"{sides['pruned'].data.metrics['python/perplexity']:.4f}"
    assert "tiny without" in kept.description
    folder = fetch_model(version.uri, served_workspace)
    assert folder_sha256(folder) == kept.tags["sha256"] == folder_sha256(run / "bundle" / "model")
    loaded = mlflow.pyfunc.load_model(version.uri)
    assert loaded.metadata.signature.inputs.input_names() == ["prompt"]
    [text] = loaded.predict(loaded.input_example, params={"max_new_tokens": 3})
    assert isinstance(text, str)


@pytest.mark.parametrize("where", ["workspace", "served_workspace"])
def test_changed_files_are_refused_where_they_are_fetched_and_served(run, where, request, monkeypatch, capsys):
    workspace = request.getfixturevalue(where)
    version = registered(run, workspace, name="changed-slim")
    folder = fetch_model(version.uri, workspace)
    weights = next(folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    with pytest.raises(OSError, match="are not those that were registered"):
        fetch_model(version.uri, workspace)
    monkeypatch.setattr(sys, "argv", ["slimgpt", "serve", version.uri, "--runs", str(workspace.root)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "are not those that were registered" in capsys.readouterr().err


def test_files_changed_on_the_server_are_refused(run, served_workspace, mlflow_server):
    version = registered(run, served_workspace, name="changed-there-slim")
    [kept] = (mlflow_server.place / "artifacts").rglob(f"{version.model_id}/artifacts/artifacts/model/config.json")
    kept.write_text(kept.read_text() + " ")
    with pytest.raises(OSError, match="changed-there-slim@challenger: the files in .* are not those"):
        fetch_model(version.uri, served_workspace)


def test_a_version_from_before_there_was_a_lineage_is_loaded_promoted_and_pruned_again(run, served_workspace, tmp_path):
    """It holds pruning.json alone, and lacks the tags that name steps."""
    old = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(old / "bundle")
    for folder in (run / "model", old / "model"):
        assert (folder / "lineage.json").is_file()
    (old / "model" / "lineage.json").unlink()
    write_bundle(old / "model", old / "bundle", name="tiny")
    version = registered(old, served_workspace, name="old-slim")
    client = open_client(served_workspace)
    for tag in ("steps", "dense_model"):
        client.delete_model_version_tag("old-slim", version.version, tag)
    gates = GateConfig(max_perplexity_ratio=100, min_accuracy_retention=0, min_speedup=0)
    assert promote("old-slim", 1, "champion", gates, served_workspace).summary == "champion of old-slim is version 1"
    fetched = fetch_model("models:/old-slim@champion", served_workspace)
    assert not (fetched / "lineage.json").exists()
    assert [step.step for step in Checkpoint.open(fetched).lineage.steps] == ["prune"]
    [text] = mlflow.pyfunc.load_model(version.uri).predict([{"prompt": "def"}], params={"max_new_tokens": 3})
    assert isinstance(text, str)
    prune(fetched, tmp_path / "again", finished_run.PRUNE)
    again = load_lineage(tmp_path / "again")
    assert [step.step for step in again.steps] == ["prune", "prune"]
    assert again.base_model == "tiny"


@pytest.mark.skipif(bool(missing_packages()), reason=missing_packages()[:200] or "they are here")
def test_a_quantised_version_loads_back_and_asks_for_what_reads_it(run, workspace, tmp_path):
    small = tmp_path / "small"
    quantize(run / "bundle/model", small, QuantizeConfig(scheme="fp8", device="cpu"))
    write_bundle(small, tmp_path / "bundle", name="tiny")
    version = registered(run, workspace, "quantised-slim", model=tmp_path / "bundle/model")
    assert fetch_model(version.uri, workspace).joinpath("quantization.json").is_file()
    loaded = mlflow.pyfunc.load_model(version.uri)
    lines = Path(mlflow.pyfunc.get_model_dependencies(version.uri)).read_text().splitlines()
    needs = [Requirement(line).name for line in lines]
    assert "compressed-tensors" in needs
    model, tokenizer = load_causal_lm(small, torch.float32), AutoTokenizer.from_pretrained(small)
    ids_BT = tokenizer(["def"], return_tensors="pt")["input_ids"]
    expected = model.generate(ids_BT, max_new_tokens=3, do_sample=False)[0, ids_BT.shape[1] :]
    [text] = loaded.predict([{"prompt": "def"}], params={"max_new_tokens": 3})
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_server_that_dies_during_the_upload_leaves_nothing_that_looks_complete(
    run, own_server, tmp_path, monkeypatch, caplog
):
    for variable in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(variable, "")  # and taken back after the test
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own_server.url.replace("http://", "http://planted0user:planted0word@"))
    workspace = Workspace.at(tmp_path / "runs")
    first = registered(run, workspace)

    def kill_at_the_first_file_of_the_second_model():
        while True:
            files = (own_server.place / "artifacts").rglob("artifacts/artifacts/model/*")
            if any(first.model_id not in str(file) for file in files):
                os.killpg(own_server.process.pid, signal.SIGKILL)
                return
            time.sleep(0.001)

    killer = threading.Thread(target=kill_at_the_first_file_of_the_second_model)
    killer.start()
    with pytest.raises(ConnectionError, match="MLflow failed while tiny-slim was registered .*has not moved") as error:
        registered(run, workspace)
    killer.join()
    assert "\n" not in str(error.value)
    assert "planted0" not in str(error.value) + caplog.text
    own_server.start()
    client = open_client(workspace)
    assert [version.run_id for version in client.search_model_versions("name='tiny-slim'")] == [first.run_id]
    assert client.get_model_version_by_alias("tiny-slim", "challenger").run_id == first.run_id
    experiment = client.get_experiment_by_name("slimgpt").experiment_id
    models = {model.model_id: model for model in client.search_logged_models([experiment])}
    [half] = [model for model in models.values() if model.model_id != first.model_id]
    assert half.status != LoggedModelStatus.READY
    for uri in (f"models:/{half.model_id}", f"runs:/{half.source_run_id}"):
        with pytest.raises(FileNotFoundError, match="registration did not finish"):
            fetch_model(uri, workspace)
    again = registered(run, workspace)
    assert again.version == "2"
    assert client.get_model_version_by_alias("tiny-slim", "challenger").run_id == again.run_id
    assert folder_sha256(fetch_model(again.uri, workspace)) == folder_sha256(run / "bundle" / "model")


@pytest.mark.parametrize("lost", ["upload_model", "_create_version", "set_alias"])
def test_a_second_try_goes_on_with_the_model_and_the_version_of_the_first(run, workspace, monkeypatch, lost):
    """The server did what it was asked to, and its answer is lost."""
    real, calls = getattr(versions, lost), []

    def without_an_answer(*given, **named):
        result = real(*given, **named)
        calls.append(lost)
        if len(calls) == 1:
            raise requests.ConnectionError("no answer")
        return result

    monkeypatch.setattr(versions, lost, without_an_answer)
    request = finished_run.request(run, "tiny-slim", config=RegistryConfig(machine_seconds=0))
    with (
        disable_run_logger(),
        open_run("tiny-slim", request.parameters, request.config, workspace, request.folder) as live,
    ):
        with pytest.raises(ConnectionError, match="the alias challenger has not moved"):
            register.fn(request, live)
        version = register.fn(request, live)
    client = open_client(workspace)
    assert [kept.version for kept in client.search_model_versions("name='tiny-slim'")] == [int(version.version)]
    top = client.get_run(version.run_id)
    assert [model.model_id for model in top.outputs.model_outputs] == [version.model_id]
    below = client.search_runs([top.info.experiment_id], f"tags.mlflow.parentRunId = '{version.run_id}'")
    assert sorted(one.data.tags["side"] for one in below) == ["dense", "pruned"]
    assert {one.info.status for one in (top, *below)} == {"FINISHED"}
    assert len(client.get_metric_history(version.run_id, "pruning/ratio")) == 1
    assert len(top.inputs.dataset_inputs) == 2
    assert folder_sha256(fetch_model(f"runs:/{version.run_id}", workspace)) == folder_sha256(run / "bundle" / "model")


@pytest.mark.slow
def test_two_registrations_of_one_name_at_once_are_both_complete(run, served_workspace, prefect_server, tmp_path):
    servers = (PREFECT_API_URL.value(), served_workspace.tracking_uri)
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    both = []
    for i, log in enumerate(logs):
        own = shutil.copytree(run, tmp_path / str(i) / "run")
        both.append(processes.start(finished_run.in_process, own, "twins-slim", tmp_path / f"runs{i}", *servers, log))
    for process, log in zip(both, logs, strict=True):
        process.join()
        assert process.exitcode == 0, log.read_text()
    client = MlflowClient(served_workspace.tracking_uri)
    versions = client.search_model_versions("name='twins-slim'")
    assert {(str(version.version), version.status) for version in versions} == {("1", "READY"), ("2", "READY")}
    assert len({version.run_id for version in versions}) == 2
    assert str(client.get_model_version_by_alias("twins-slim", "challenger").version) in ("1", "2")
    for number in (1, 2):
        folder = fetch_model(f"models:/twins-slim/{number}", served_workspace)
        assert folder_sha256(folder) == folder_sha256(run / "bundle" / "model")
