"""Every family on vLLM, in float32: the tokens and the probabilities that transformers gives, with a LoRA adapter too.

Twice: with our plugin and no remote code, and on stock vLLM where no package of ours can be imported. There, families
that ask nothing else of vLLM's Transformers backend than others do are left to `make test-all`.
"""

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from deploy.engines.availability import vllm_obstacle
from tests.deploy.engines.generate import Steps, assert_same_steps, greedy_steps, run_engines, tokens
from tests.tiny_families import CASES

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here"),
]


# With our plugin, every family without a native class runs on the same backend (test_with_the_plugin). Here are those
# with one: llama, and phi3 with its fused projections; and of the others what asks most of the backend: attention of
# two kinds with capped logits, and layers without rope.
STRUCTURES = ("llama", "phi3", "gemma2", "smollm3")


@pytest.fixture(scope="module")
def folders(pruned_family) -> dict[str, Path]:
    return {case: pruned_family(case)[1] for case in CASES}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def expected(folders, adapters) -> dict[str, Steps]:
    """What transformers answers, then what it answers with a random adapter on every projection, which is saved."""
    answers = {}
    for case, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = greedy_steps(model)
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(adapters / case)
        with_adapter = greedy_steps(adapted)
        assert tokens(with_adapter) != tokens(plain)
        answers[case] = plain + with_adapter
    return answers


def check(engines, expected, cwd, **options):
    answers, _ = run_engines(engines, cwd, **options)
    for (case, want), answer in zip(expected.items(), answers, strict=True):
        assert "error" not in answer, f"{case}: {answer['error']}"
        assert_same_steps(answer["steps"], want, case)


def test_with_the_plugin(folders, adapters, expected, tmp_path):
    # On CPU, vLLM gives a request without adapter the last slot's (vllm#48421): one slot more than adapters is empty.
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    engines = [{"model": str(folder), **lora, "lora": str(adapters / case)} for case, folder in folders.items()]
    check(engines, expected, tmp_path)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(STRUCTURES, id="structures"),
        pytest.param([case for case in CASES if case not in STRUCTURES], id="others", marks=pytest.mark.all),
    ],
)
def test_on_stock_vllm(cases, folders, expected, tmp_path, stock_python):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_PLUGINS": "", "HF_HOME": str(tmp_path / "hf")}
    engines = [{"model": str(folders[case]), "trust_remote_code": True} for case in cases]
    plain = {case: expected[case][: len(expected[case]) // 2] for case in cases}
    check(engines, plain, tmp_path, python=stock_python, env=env)
