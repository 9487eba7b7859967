"""Real models of other families the whole way: a GGUF file is pruned, measured, and served as transformers computes it.

`make test-real` runs them: the files are fetched, hundreds of MB each.
"""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimgpt.modeling  # noqa: F401  (registers the pruned forms)
from deploy.engines.availability import vllm_obstacle
from slimgpt.checkpoints.building import building
from slimgpt.checkpoints.headers import read_json
from slimgpt.checkpoints.source import resolve_model
from slimgpt.config import EvalConfig, PruneConfig
from slimgpt.engine.pruner import prune
from slimgpt.evaluation.harness import evaluate
from tests.deploy.engines.generate import assert_same_steps, greedy_steps, run_engines
from tests.real_models import REAL, real_gguf

pytestmark = [
    pytest.mark.real,
    pytest.mark.vllm,
    pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here"),
]
TYPES = {"gemma-3-270m": "gemma3_text", "qwen2.5-coder-0.5b": "qwen2"}
TEXTS = ("The capital of France is", "def fibonacci(n):\n", "Water boils at", "Once upon a time there was a")
BOS = {"gemma-3-270m": "block", "qwen2.5-coder-0.5b": "none"}


@pytest.fixture(scope="module", params=REAL)
def real(request, tmp_path_factory):
    """Its name, the dense folder, and what pruning with few tokens makes of it."""
    dense = resolve_model(real_gguf(request.param))
    pruned = tmp_path_factory.mktemp(request.param) / "pruned"
    prune(dense, pruned, PruneConfig(ratio=0.25, schedule="log", calibration="python", num_samples=8, seq_len=512))
    return request.param, dense, pruned


def test_it_is_read_as_its_family_and_keeps_its_name_when_pruned(real):
    name, dense, pruned = real
    assert read_json(dense / "config.json")["model_type"] == TYPES[name]
    for folder in (dense, pruned):
        assert read_json(folder / "config.json")["dequantized_from"].startswith(f"{name}.gguf (Q4_K_M")
    assert AutoTokenizer.from_pretrained(pruned).get_vocab() == AutoTokenizer.from_pretrained(dense).get_vocab()


def test_the_pruned_model_still_knows_its_language(real):
    name, dense, pruned = real
    request = EvalConfig(tasks=("none",), perplexity="python", seq_len=512, max_blocks=4)
    before, after = (evaluate(folder, request) for folder in (dense, pruned))
    assert [made.config["bos"] for made in (before, after)] == [BOS[name]] * 2
    (value,), (pruned_value,) = (
        [value for metric, value in made.metrics.items() if metric.endswith("/perplexity")] for made in (before, after)
    )
    assert value < pruned_value < 3 * value < 60


def test_vllm_serves_it_with_and_without_the_plugin_as_transformers_computes_it(real, tmp_path, stock_python):
    name, _, pruned = real
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    start = [tokenizer.bos_token_id] if BOS[name] == "block" else []
    prompts = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    with building:
        model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    expected = greedy_steps(model, prompts)
    del model
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_PLUGINS": "", "HF_HOME": str(tmp_path / "hf")}
    stock = {"python": stock_python, "env": env}
    for case, engine, where in (("plugin", {}, {}), ("stock vLLM", {"trust_remote_code": True}, stock)):
        ((answer,), _) = run_engines([{"model": str(pruned), **engine}], tmp_path, prompts=prompts, **where)
        assert "error" not in answer, answer
        assert_same_steps(answer["steps"], expected, case)
