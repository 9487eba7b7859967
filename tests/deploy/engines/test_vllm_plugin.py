"""The plugin's own decisions; that vLLM finds it in every process is shown by every test that serves."""

import logging

import pytest

from deploy.engines import vllm_plugin
from deploy.engines.vllm_plugin import register


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.33.0rc1+cpu", "1.32.0"])
def test_with_an_untested_vllm_nothing_of_it_is_touched_and_the_remedy_is_said(version, caplog, monkeypatch):
    """vLLM's inside may have changed, and stock models must stay servable."""
    monkeypatch.setattr(vllm_plugin, "vllm_version", lambda: version)  # this machine has one version alone
    with caplog.at_level(logging.ERROR, "vllm.slimgpt"):
        register()
    (line,) = caplog.messages
    assert "pruned checkpoints are not registered" in line
    assert f"vLLM {version} is outside the tested range" in line
    assert "'vllm>=0.32,<0.33'" in line and "--trust-remote-code" in line
