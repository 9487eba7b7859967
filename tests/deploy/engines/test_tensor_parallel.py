"""Tensor and pipeline parallelism: sizes that divide every layer give the same tokens, others are refused by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy.engines.availability import vllm_obstacle
from deploy.engines.tensor_parallel import check_tensor_parallel, tensor_parallel_sizes
from slimgpt.config import PruneConfig
from slimgpt.engine.pruner import prune
from slimgpt.modeling.slim_llama import SlimLlamaConfig
from tests.deploy.engines.generate import assert_same_steps, greedy_steps, run_engines
from tests.deploy.slim_checkpoint import write_slim
from tests.tiny_families import write_family

pytestmark = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")


def config(*widths: tuple[int, int, int]) -> SlimLlamaConfig:
    """Of layers with these heads, kv heads and FFN widths."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    layers = {i: dict(zip(names, layer, strict=True)) for i, layer in enumerate(widths)}
    return SlimLlamaConfig(num_hidden_layers=len(widths), head_dim=32, per_layer_config=layers)


@pytest.mark.parametrize(
    ("second", "size", "said"),
    [
        ((6, 2, 96), 4, "layer 1 has 6 heads, .* size 4 .* sizes that work: 1, 2[.] .*--head-multiple 4 "),
        ((6, 3, 96), 2, "layer 1 has 3 kv heads, .* sizes that work: 1[.] .*--head-multiple 2 "),
        ((8, 4, 98), 4, "layer 1 has an FFN width of 98, .* sizes that work: 1, 2[.] .*--ffn-multiple"),
    ],
)
def test_the_layer_its_value_the_sizes_that_work_and_the_remedy_are_named(second, size, said):
    with pytest.raises(ValueError, match=said):
        check_tensor_parallel(config((8, 4, 128), second), size)


def test_sizes_divide_every_layer_or_copy_its_kv_heads():
    assert tensor_parallel_sizes(config((8, 4, 128), (4, 1, 96))) == [1, 2, 4]
    assert tensor_parallel_sizes(config((8, 4, 128), (6, 6, 96))) == [1, 2]
    assert tensor_parallel_sizes(config((7, 7, 128))) == [1]
    check_tensor_parallel(config((8, 4, 128), (4, 1, 96)), 4)


@pytest.mark.parametrize(
    ("layer", "group", "sizes", "said"),
    [
        ((6, 2, 256), 32, [1, 2], "layer 0 has 6 heads, which tensor parallel size 4"),
        ((8, 4, 96), 32, [1], "layer 0 has an FFN width of 96 in groups of 32, which tensor parallel size 4"),
        ((4, 4, 512), 64, [1, 2], "layer 0 has 128 columns of heads in groups of 64, which tensor parallel size 4"),
    ],
)
def test_weights_that_share_a_scale_stay_together(layer, group, sizes, said):
    quantized = config(layer)
    quantized.quantization_config = {"config_groups": {"group_0": {"weights": {"group_size": group}}}}
    assert tensor_parallel_sizes(quantized) == sizes
    with pytest.raises(ValueError, match=said):
        check_tensor_parallel(quantized, 4)


@needs_vllm
@pytest.mark.all
def test_two_ranks_of_a_family_on_vllms_transformers_backend(tmp_path):
    """Pruned with --head-multiple 2. The backend divides layers as the native class does below."""
    settings = PruneConfig(
        ratio=0.3,
        schedule="log",
        head_multiple=2,
        ffn_multiple=2,
        head_budget="ratio",
        calibration="python",
        num_samples=8,
        seq_len=48,
    )
    prune(write_family(tmp_path / "dense", "qwen3"), tmp_path / "pruned", settings)
    (of_pruned,), log = run_engines([{"model": str(tmp_path / "pruned"), "tensor_parallel_size": 2}], tmp_path)
    _check(of_pruned, tmp_path / "pruned", log)


def _check(answer, model, log):
    assert "error" not in answer, answer["error"] + log[-3000:]
    want = greedy_steps(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert_same_steps(answer["steps"], want, model.name)


@needs_vllm
def test_two_ranks_give_the_tokens_of_transformers(tmp_path):
    """Widths as --head-multiple 2 leaves them; a kv head is copied."""
    copied = write_slim(tmp_path / "copied", widths=[(6, 2, 96), (4, 4, 128), (2, 1, 64), (8, 4, 256)])
    odd = write_slim(tmp_path / "odd")  # layer 2 has 3 heads
    engines = [{"model": str(model), "tensor_parallel_size": 2} for model in (copied, odd)]
    (of_copied, refused), log = run_engines(engines, tmp_path)
    _check(of_copied, copied, log)
    assert "layer 2 has 3 heads, which tensor parallel size 2 does not divide" in refused["error"]
    assert "--head-multiple 2" in refused["error"]
    assert kv_heads_by_rank(of_copied) == [[1, 2, 1, 2]] * 2  # half of each layer's


@needs_vllm
@pytest.mark.all
def test_two_pipeline_stages_give_the_tokens_of_transformers(tmp_path):
    """Any widths will do: each rank holds half of the layers."""
    odd = write_slim(tmp_path / "odd")
    engine = {
        "model": str(odd),
        "pipeline_parallel_size": 2,
        # Eager, vLLM's CPU workers skip the warm-up that makes the buffers between stages, whatever the model.
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},  # traced, not compiled
    }
    (of_stages,), log = run_engines([engine], tmp_path)
    _check(of_stages, odd, log)
    assert kv_heads_by_rank(of_stages) == [[2, 4], [1, 4]]


def kv_heads_by_rank(answer) -> list[list[int]]:
    return [[heads for heads, _ in rank.values()] for rank in answer["kv_layers"]]
