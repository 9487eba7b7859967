"""Versions that refer to a folder of a run: nothing is copied, and the folder stays as it was registered."""

import shutil
from dataclasses import replace

import mlflow
import pytest

from deploy.bundle.folder import verify_bundle
from slimgpt.checkpoints.lineage import Checkpoint
from tasks.environment import RunFolder
from tasks.registry.client import open_client
from tasks.registry.config import RegistryConfig
from tasks.registry.fetching import fetch_model
from tasks.steps.bundling import package
from tests.tasks.registry import finished_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run.make(tmp_path_factory.mktemp("finished"))


def test_a_second_compression_of_the_same_leaves_the_version_by_reference_as_it_is(run, workspace, tmp_path):
    """Other figures change the card in the bundle, which the first version's checksum covers."""
    folder, config = RunFolder(shutil.copytree(run, tmp_path / "run")), RegistryConfig(weights="reference")
    pruned, versions = Checkpoint.open(folder.model), []
    for perplexity in (3.0, 3.0, 4.0):
        given = finished_run.request(folder.root, "referred-slim", config=config)
        measured = replace(given.pruned, metrics={"python/perplexity": perplexity})
        bundle = package.fn(pruned, given.dense, measured, "referred-slim", folder, config)
        versions.append(finished_run.registered(replace(given, model=bundle.model, pruned=measured), workspace))
    places = [fetch_model(f"models:/referred-slim/{version.version}", workspace) for version in versions]
    assert places[0] == places[1] != places[2]
    for place in places:
        assert verify_bundle(place.parent) == []
        weights = sorted(path.name for path in place.glob("*.safetensors"))
        assert all((place / name).samefile(folder.model / name) for name in weights)  # no second copy


def test_by_reference_nothing_is_copied_and_it_is_found_checked_and_loaded(run, served_workspace, tmp_path):
    model = tmp_path / "stays" / "model"
    shutil.copytree(run / "bundle", model.parent)
    config = RegistryConfig(weights="reference")
    version = finished_run.registered(
        finished_run.request(run, "referred-slim", model=model, config=config), served_workspace
    )
    client = open_client(served_workspace)
    names = [file.path for file in client.list_logged_model_artifacts(version.model_id)]
    assert "MLmodel" in names
    assert not any("safetensors" in f.path for f in client.list_logged_model_artifacts(version.model_id, "artifacts"))
    assert fetch_model(version.uri, served_workspace) == model
    [text] = mlflow.pyfunc.load_model(version.uri).predict([{"prompt": "def"}], params={"max_new_tokens": 3})
    assert isinstance(text, str)
    (model / "config.json").write_text("{}")
    with pytest.raises(OSError, match="are not those that were registered"):
        fetch_model(version.uri, served_workspace)
    shutil.rmtree(model)
    with pytest.raises(FileNotFoundError, match="registered by reference to .*, which is not there"):
        fetch_model(version.uri, served_workspace)
