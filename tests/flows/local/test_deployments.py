"""prefect.yaml and the files of deploy/pools name flows and settings that there are."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from flows.local.machine import Local

ROOT = Path(__file__).parents[3]
FILES = [ROOT / "prefect.yaml", *sorted((ROOT / "deploy" / "pools").glob("*.yaml"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_deployment_names_a_flow_of_ours_by_module_and_holds_no_path_of_a_machine(file):
    content = yaml.safe_load(file.read_text())
    assert content["deployments"]
    for deployment in content["deployments"]:
        assert re.fullmatch(r"flows\.\w+:\w+", deployment["entrypoint"])
        assert load_flow_from_entrypoint(deployment["entrypoint"]).name == deployment["entrypoint"].partition(":")[2]
        assert deployment["work_pool"]["name"].startswith("slimgpt")
        assert "slimgpt" in deployment["tags"]
    # left out, Prefect writes the deploying machine's folder
    (step,) = content["pull"]
    assert step["prefect.deployments.steps.set_working_directory"]["directory"] in (".", "/srv/slimgpt")


def test_the_kubernetes_job_uses_each_variable_and_knows_those_that_the_deployments_set():
    template = json.loads((ROOT / "deploy" / "pools" / "kubernetes-job.json").read_text())
    declared = set(template["variables"]["properties"])
    assert set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"]))) == declared
    deployments = yaml.safe_load((ROOT / "deploy" / "pools" / "kubernetes.yaml").read_text())["deployments"]
    for deployment in deployments:
        assert set(deployment["work_pool"]["job_variables"]) <= declared


@pytest.mark.parametrize("slots", ["0", "two", "-1", "1.5"])
def test_slots_that_would_hold_every_step_for_ever_are_refused_before_anything_starts(monkeypatch, tmp_path, slots):
    monkeypatch.setenv("SLIMGPT_RUNS", str(tmp_path))
    monkeypatch.setenv("SLIMGPT_GPU_SLOTS", slots)
    with pytest.raises(ValueError, match=f"SLIMGPT_GPU_SLOTS is '{slots}'; it must be a whole number of at least 1"):
        Local.here().up()
    assert not list(tmp_path.rglob("*.json"))
