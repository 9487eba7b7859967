"""Every family on vLLM, in float32: the tokens and the probabilities that transformers gives, with a LoRA adapter too.

Twice: with our plugin and no remote code, and on stock vLLM where no package of ours can be imported.
"""

import os

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from deploy.engines.availability import vllm_obstacle
from slimgpt.config import PruneConfig
from slimgpt.engine.pruner import prune
from tests.deploy.engines.generate import Steps, assert_same_steps, greedy_steps, run_engines, tokens
from tests.tiny_families import CASES, write_family

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    made = []
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        dense = write_family(folder / "dense", case)
        config = PruneConfig(
            ratio=0.3, head_budget="ratio", ffn_multiple=4, calibration="python", num_samples=8, seq_len=48
        )
        prune(dense, folder / "out", config)
        made.append(str(folder / "out"))
    return made


@pytest.fixture(scope="module")
def expected(folders) -> list[Steps]:
    """What transformers answers, then what it answers with a random adapter on every projection, which is saved."""
    answers = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        plain = greedy_steps(model)
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        adapted.save_pretrained(f"{folder}/../adapter")
        with_adapter = greedy_steps(adapted)
        assert tokens(with_adapter) != tokens(plain)
        answers.append(plain + with_adapter)
    return answers


def check(engines, expected, cwd, **options):
    answers, _ = run_engines(engines, cwd, **options)
    for case, answer, want in zip(CASES, answers, expected, strict=True):
        assert "error" not in answer, f"{case}: {answer['error']}"
        assert_same_steps(answer["steps"], want, case)


def test_with_the_plugin(folders, expected, tmp_path):
    # On CPU, vLLM gives a request without adapter the last slot's (vllm#48421): one slot more than adapters is empty.
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    engines = [{"model": folder, **lora, "lora": f"{folder}/../adapter"} for folder in folders]
    check(engines, expected, tmp_path)


def test_on_stock_vllm(folders, expected, tmp_path, stock_python):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"VLLM_PLUGINS": "", "HF_HOME": str(tmp_path / "hf")}
    engines = [{"model": folder, "trust_remote_code": True} for folder in folders]
    check(engines, [want[: len(want) // 2] for want in expected], tmp_path, python=stock_python, env=env)
