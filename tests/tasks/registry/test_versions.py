"""What becomes a version, and what does not."""

import dataclasses
import re

import pytest

from tasks.registry.client import open_client
from tasks.registry.config import RegistryConfig
from tasks.registry.versions import version_obstacle
from tests.tasks.registry import finished_run

QUIET = RegistryConfig(machine_seconds=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run.make(tmp_path_factory.mktemp("finished"))


def newest(workspace, count=1):
    client = open_client(workspace)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, max_results=count)


@pytest.mark.parametrize(
    ("change", "obstacle"),
    [
        ({}, None),
        ({"dense": None}, "the dense model is not evaluated"),
        ({"pruned": None}, "the pruned model is not evaluated"),
        ({"dense": None, "pruned": None, "without_evaluation": True}, None),
        ({"model": "model"}, "it is not packaged: .* has no MANIFEST.json"),
        ({"model": "bundle"}, "it is not pruned: .* has no pruning.json"),
    ],
)
def test_a_version_needs_a_pruned_evaluated_packaged_model(run, workspace, change, obstacle):
    if "model" in change:
        change = {"model": run / change["model"]}
    request = dataclasses.replace(finished_run.request(run, "tiny-slim", config=QUIET), **change)
    if obstacle is None:
        assert version_obstacle(request) is None
        assert finished_run.registered(request, workspace).version == "1"
        return
    assert re.fullmatch(obstacle, version_obstacle(request))
    with pytest.raises(ValueError if "pruned:" not in obstacle else FileNotFoundError):  # there is no report to log
        finished_run.registered(request, workspace)
    assert open_client(workspace).search_model_versions("name='tiny-slim'") == []
    [top] = [one for one in newest(workspace, 5) if "mlflow.parentRunId" not in one.data.tags]
    assert top.info.status == "FAILED"
