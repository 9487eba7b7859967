"""Quantised models with another width in each layer, on stock vLLM's kernels by our plugin: transformers' tokens.

One structure in three formats; that every family is quantised and served is left to `make test-all`.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from deploy.engines.availability import vllm_obstacle
from slimgpt.checkpoints.loading import load_causal_lm
from slimgpt.config import QuantizeConfig
from slimgpt.engine.pruner import prune
from slimgpt.quantization.packages import missing_packages
from slimgpt.quantization.quantizer import quantize
from tests.deploy.engines.generate import PROMPTS, Steps, run_engines
from tests.deploy.slim_checkpoint import write_slim
from tests.tiny_families import CASES, PRUNE, write_family

OBSTACLE = vllm_obstacle() or missing_packages()[:200]
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE or "vLLM runs here")]
# Nats between the two: vLLM computes in 16 bits here, and rounds activations by kernels of its own, others on each kind
# of processor (w4a16 at most 0.05 with AVX512-BF16, 0.094 with AMX; 0.5 on average from the model before). Where a
# number falls into another of fp8's wide bins, a random model's answers differ as much as from the unrounded one.
NEAR = {"w4a16": 0.15, "w8a8": 0.15, "fp8": 0.7}


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


@pytest.mark.all
def test_every_family_in_four_bits(tmp_path):
    config = QuantizeConfig(calibration="python", num_samples=8, seq_len=48, device="cpu")
    for case in CASES:
        prune(
            write_family(tmp_path / case / "dense", case), tmp_path / case / "pruned", replace(PRUNE, ffn_multiple=32)
        )
        quantize(tmp_path / case / "pruned", tmp_path / case / "small", config)
    engines = [{"model": str(tmp_path / case / "small"), "dtype": "bfloat16"} for case in CASES]
    answers, _ = run_engines(engines, tmp_path)
    for case, answer in zip(CASES, answers, strict=True):
        assert "error" not in answer, (case, answer)
        rounded, unrounded = (load_causal_lm(tmp_path / case / name, torch.float32) for name in ("small", "pruned"))
        distances = apart(answer["steps"], rounded, case, near=0.15)
        assert max(distances) < 0.15, case
        assert sum(distances) < 0.2 * sum(apart(answer["steps"], unrounded, case, near=10)), case
