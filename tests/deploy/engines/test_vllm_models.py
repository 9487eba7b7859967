"""The native vLLM classes under the options that people serve with, against transformers on the same checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deploy.engines.availability import vllm_obstacle
from deploy.engines.vllm_plugin import NATIVE
from tests.deploy.engines.generate import PROMPTS, assert_same_steps, greedy_steps, run_engines
from tests.deploy.slim_checkpoint import WIDTHS, write_dense, write_slim
from tests.tiny_models import VOCAB_SIZE

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here"),
]

OPTIONS = {
    "prefix caching": {"enable_prefix_caching": True, "block_size": 32, "again": True},
    "no prefix caching": {"enable_prefix_caching": False, "block_size": 32, "again": True},
    "chunked prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 16},  # the longest prompt has 42
}


def test_options_change_no_token_and_the_kv_cache_is_sized_by_layer(tmp_path):
    slim, dense = write_slim(tmp_path / "slim"), write_dense(tmp_path / "dense")
    two_layers = write_slim(tmp_path / "two_layers", widths=WIDTHS[1:3])  # every layer costs seconds of compilation
    want, want_compiled = (
        greedy_steps(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)) for model in (slim, two_layers)
    )
    engines = [{"model": str(slim), **options} for options in OPTIONS.values()]
    engines += [{"model": str(two_layers), "enforce_eager": False}, {"model": str(dense)}]
    (*answers, compiled, of_dense), log = run_engines(engines, tmp_path)
    assert "error" not in compiled, compiled["error"]
    assert_same_steps(compiled["steps"], want_compiled, "torch.compile")
    for name, answer in zip(OPTIONS, answers, strict=True):
        assert "error" not in answer, f"{name}: {answer['error']}"
        assert_same_steps(answer["steps"], want, name)
    cached, fresh, chunked = answers
    assert cached["cached_tokens"] == [0, 0, 32]  # the one full block of the longest prompt
    assert fresh["cached_tokens"] == [0, 0, 0]
    assert "Warming up model for the compilation" in log

    (layers,) = chunked["kv_layers"]
    for (kv_heads, page_bytes), (_, expected, _) in zip(layers.values(), WIDTHS, strict=True):
        assert kv_heads == expected
        assert page_bytes == 128 * expected * 32 * 2 * 4  # tokens a page, kv heads, head_dim, k and v, float32
    # 1 GiB for 11 kv heads in four layers, against 16
    assert chunked["kv_tokens"] == 2**30 // (128 * 11 * 32 * 2 * 4) * 128
    assert of_dense["kv_tokens"] == 2**30 // (128 * 16 * 32 * 2 * 4) * 128


def write_w8a8(dense: Path, folder: Path) -> Path:
    """A checkpoint in eight bits as llm-compressor writes it: weights by output channel, activations by token."""
    shutil.copytree(dense, folder)
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight_OI = tensors[name].float()
        scale_O1 = weight_OI.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight_OI / scale_O1).round().to(torch.int8)
        tensors[name.replace("weight", "weight_scale")] = scale_O1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def pruned(pruned_family) -> dict[str, Path]:
    """Every native family, pruned to FFN widths that are multiples of 4 alone."""
    return {family: pruned_family(family)[1] for family in NATIVE}


@pytest.fixture(scope="module")
def served_logits(pruned, tmp_path_factory) -> dict[str, torch.Tensor]:
    """[prompts, vocabulary] of each native family in bfloat16, and of two in eight bits and float32.

    The latter without AMX: vLLM 0.32's kernel for it takes no float32, and fails at fused widths of 16 more than a
    multiple of 32.
    """
    folder = tmp_path_factory.mktemp("w8a8")
    engines = {family: {"model": str(model), "dtype": "bfloat16"} for family, model in pruned.items()}
    for family in ("llama", "phi3"):
        engines[f"{family} w8a8"] = {"model": str(write_w8a8(pruned[family], folder / family)), "amx": False}
    answers, _ = run_engines([{**engine, "logits": VOCAB_SIZE} for engine in engines.values()], folder)
    for name, answer in zip(engines, answers, strict=True):
        assert "error" not in answer, f"{name}: {answer['error']}"
    return {name: torch.tensor(answer["logits"]) for name, answer in zip(engines, answers, strict=True)}


def last_logits(model: Any) -> torch.Tensor:
    """[prompts, vocabulary], from transformers"""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1].float() for ids in PROMPTS])


@pytest.mark.parametrize("family", NATIVE)
def test_bfloat16_logits(family, pruned, served_logits):
    served = served_logits[family]
    bf16, exact = (
        last_logits(AutoModelForCausalLM.from_pretrained(pruned[family], dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert (served - bf16).abs().max() <= 2e-2 * exact.abs().max()
    assert (served - exact).norm() <= 1.5 * (bf16 - exact).norm()  # no further from float32 than bfloat16 itself is


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_quantised_pruned_checkpoint_computes_what_its_eight_bits_say(family, pruned, served_logits):
    """FFN widths are no multiple of 16 here. The oracle rounds weights and activations in float32 by itself.

    A value within float32's error of the edge between two steps may fall either way, and moves the logits by up to a
    percent. So the oracle is asked again with its activations moved by that error: one of the answers is vLLM's.
    """
    model = AutoModelForCausalLM.from_pretrained(pruned[family], dtype=torch.float32)
    exact_PV = last_logits(model)
    assert any(layer.mlp.down_proj.in_features % 16 for layer in model.model.layers)
    generator, error = torch.Generator().manual_seed(0), 0.0

    def in_eight_bits(x_TD: torch.Tensor) -> torch.Tensor:
        moved_TD = x_TD * (1 + error * torch.randn(x_TD.shape, generator=generator))
        scale_T1 = moved_TD.abs().amax(-1, keepdim=True) / 127
        return (moved_TD / scale_T1).round() * scale_T1

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.weight.data = in_eight_bits(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (in_eight_bits(inputs[0]),))
    answers = [last_logits(model)]
    assert (answers[0] - exact_PV).norm() > 1e-2 * exact_PV.norm()
    error = 1e-6
    answers += [last_logits(model) for _ in range(20)]
    served_PV = served_logits[f"{family} w8a8"]
    distances_AP = torch.stack([(served_PV - answer_PV).norm(dim=-1) for answer_PV in answers])
    assert (distances_AP.amin(0) < 2e-5 * served_PV.norm(dim=-1)).all()
