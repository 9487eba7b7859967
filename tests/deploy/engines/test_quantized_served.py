"""Quantised models with another width in each layer, on stock vLLM's kernels by our plugin: transformers' tokens."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from deploy.engines.availability import vllm_obstacle
from slimgpt.checkpoints.loading import load_causal_lm
from slimgpt.config import QuantizeConfig
from slimgpt.quantization.packages import missing_packages
from slimgpt.quantization.quantizer import quantize
from tests.deploy.engines.generate import PROMPTS, Steps, run_engines
from tests.deploy.slim_checkpoint import write_slim

OBSTACLE = vllm_obstacle() or missing_packages()[:200]
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "vLLM runs here")]
# Nats between the two: vLLM computes in 16 bits here, and rounds activations by kernels of its own. Where a number
# falls into another of fp8's wide bins, a random model's answers differ as much as from the model that was not rounded.
NEAR = {"w4a16": 0.05, "w8a8": 0.15, "fp8": 0.7}


def apart(got: Steps, model: Any, case: str, near: float) -> list[float]:
    """How far the log-probabilities of vLLM's tokens are from the model's; each token is its best one, or nearly."""
    found = []
    for prompt, steps in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([[*prompt, *(token for token, _ in steps)]])
        with torch.no_grad():
            logprobs_TV = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for (token, logprob), own_V in zip(steps, logprobs_TV, strict=True):
            assert float(own_V.max() - own_V[token]) < near, case
            found.append(abs(logprob - float(own_V[token])))
    return found


def test_vllm_gives_the_tokens_that_transformers_gives(tmp_path):
    pruned = write_slim(tmp_path / "pruned", dtype=torch.bfloat16)
    config = QuantizeConfig(calibration="python", num_samples=8, seq_len=64, device="cpu")
    folders = {scheme: tmp_path / scheme for scheme in NEAR}
    for scheme, folder in folders.items():
        quantize(pruned, folder, replace(config, scheme=scheme))
    engines = [{"model": str(folder), "dtype": "bfloat16"} for folder in folders.values()]
    answers, _ = run_engines(engines, tmp_path)
    unrounded = load_causal_lm(pruned, torch.float32)
    for (scheme, folder), answer in zip(folders.items(), answers, strict=True):
        assert "error" not in answer, answer
        distances = apart(answer["steps"], load_causal_lm(folder, torch.float32), scheme, NEAR[scheme])
        assert max(distances) < NEAR[scheme], scheme
        if scheme == "w4a16":  # it is the quantised model that is served
            assert sum(distances) < 0.2 * sum(apart(answer["steps"], unrounded, scheme, near=10))
