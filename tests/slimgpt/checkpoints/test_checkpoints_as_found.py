"""Checkpoints as users have them: from transformers 4 and 5, in any layout and dtype.

Each gives a result that is bit-identical to that of its plain twin.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from slimgpt.checkpoints.loading import load_causal_lm
from slimgpt.checkpoints.shards import Shards
from slimgpt.engine.job import Job
from slimgpt.engine.pruner import prune
from tests.slimgpt.checkpoints.found_checkpoints import IDS, SMALL, as_transformers_4, edit, logits, store, tensors_of
from tests.tiny_models import write_dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_way_of_writing_a_checkpoint_gives_the_same_pruning(twin, tmp_path, tiny_config, dtype, tied):
    plain, dense_logits, pruned_logits = twin(dtype, tied)
    assert not torch.equal(dense_logits, pruned_logits)
    for old, parts, head_dim in ((True, 1, False), (False, 3, False), (True, 3, True)):  # each pair of two occurs
        folder = Path(shutil.copytree(plain, tmp_path / f"{old}-{parts}-{head_dim}"))
        store(folder, tensors_of(plain), parts)
        edit(folder, drop=() if head_dim else ("head_dim",))
        if old:
            as_transformers_4(folder)
        out = tmp_path / f"{folder.name}-out"
        assert torch.equal(logits(folder), dense_logits)
        prune(folder, out, tiny_config())
        assert torch.equal(logits(out), pruned_logits)
        stored = tensors_of(out)
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
        assert ("lm_head.weight" in stored) == (not tied)


ROPES = {
    "theta": ({"rope_type": "default", "rope_theta": 500_000.0}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}, {"type": "linear", "factor": 4.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "llama3": (
        {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            **{"original_max_position_embeddings": 64, "rope_theta": 10_000.0},
        },
        {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_embeddings_of_old_and_new_configs_are_equal(twin, tmp_path, tiny_config, name):
    parameters, scaling = ROPES[name]
    _, unscaled, _ = twin(torch.float32, True)
    new = write_dense(tmp_path / "new", rope_parameters=parameters, **SMALL)
    old = Path(shutil.copytree(new, tmp_path / "old"))
    as_transformers_4(old, rope_scaling=scaling)
    assert torch.equal(logits(new), logits(old))
    assert not torch.allclose(logits(new), unscaled, atol=1e-2)  # same weights: the turning is what differs
    for folder in (new, old):
        prune(folder, tmp_path / f"{folder.name}-out", tiny_config())
    assert torch.equal(logits(tmp_path / "new-out"), logits(tmp_path / "old-out"))
    written = json.loads((tmp_path / "old-out" / "config.json").read_text())
    assert written["rope_parameters"].items() >= parameters.items()


def test_a_llama_1_checkpoint_in_its_first_conversion_is_read(tmp_path, tiny_config):
    """No kv heads, theta or head_dim in the config, a pad token of -1, and rotary buffers among the weights."""
    new = write_dense(tmp_path / "new", num_key_value_heads=8, tie_word_embeddings=False, **SMALL)
    old = Path(shutil.copytree(new, tmp_path / "old"))
    as_transformers_4(old, drop=("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"))
    edit(
        old,
        {"pad_token_id": -1, "architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048},
        ("rope_theta", "rope_scaling"),
    )
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
    store(old, tensors_of(new) | buffers, parts=2)
    assert torch.equal(logits(new), logits(old))
    for folder in (new, old):
        prune(folder, tmp_path / f"{folder.name}-out", tiny_config())
    assert torch.equal(logits(tmp_path / "new-out"), logits(tmp_path / "old-out"))
    assert not [name for name in tensors_of(tmp_path / "old-out") if "rotary" in name]


def test_norms_keep_a_dtype_that_differs_from_the_projections(twin, tmp_path, tiny_config):
    plain, _, _ = twin(torch.bfloat16, True)
    mixed = Path(shutil.copytree(plain, tmp_path / "mixed"))
    store(mixed, {n: t.float() if "norm" in n else t for n, t in tensors_of(plain).items()})
    prune(mixed, tmp_path / "out", tiny_config())
    assert {t.dtype for n, t in tensors_of(tmp_path / "out").items() if "norm" in n} == {torch.float32}
    assert {t.dtype for n, t in tensors_of(tmp_path / "out").items() if "norm" not in n} == {torch.bfloat16}
    assert torch.equal(logits(tmp_path / "out"), twin(torch.bfloat16, True)[2])


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},
        {"return_dict": False},
        {"quantization_config": {}},
    ],
    ids=["kernel", "kernel of old", "tuples", "not quantised"],
)
def test_how_its_author_ran_the_model_changes_nothing(twin, tmp_path, tiny_config, changes):
    plain, plain_logits, pruned_logits = twin(torch.float32, True)
    told = Path(shutil.copytree(plain, tmp_path / "told"))
    edit(told, changes)
    prune(told, tmp_path / "out", tiny_config())
    assert torch.equal(logits(tmp_path / "out"), pruned_logits)
    assert torch.equal(load_causal_lm(told, torch.float32)(IDS).logits, plain_logits)


def test_a_tied_model_that_stores_its_head_twice_gives_the_same_pruning(twin, tmp_path, tiny_config):
    plain, _, pruned_logits = twin(torch.float32, True)
    double = Path(shutil.copytree(plain, tmp_path / "double"))
    tensors = tensors_of(plain)
    store(double, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    prune(double, tmp_path / "out", tiny_config())
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), pruned_logits)


def test_a_weight_file_far_larger_than_memory_is_read_tensor_by_tensor(copy):
    """A sparse file of 1 TB: safetensors' own torch reader maps it privately, which the system refuses."""
    size, mark = 1 << 40, b"\x80\x3f\x00\x40"  # 1 and 2 as bfloat16
    header = {
        "x": {"dtype": "BF16", "shape": [1 << 20, 1 << 19], "data_offsets": [0, size]},
        "y": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [size, size + 4]},
    }
    text = json.dumps(header).encode()
    with (copy / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(size, os.SEEK_CUR)
        file.write(mark)
    shards = Shards(copy)
    assert shards.shape("x") == ([1 << 20, 1 << 19], torch.bfloat16)
    assert shards.load(["y"])["y"].tolist() == [[1.0], [2.0]]


def test_every_tensor_is_read_as_safetensors_reads_it(copy, tmp_path):
    """Odd sizes, scalars, empty tensors and all supported dtypes, at offsets that are not multiples of the size."""
    torch.manual_seed(0)
    tensors = {
        f"{dtype}-{shape}": torch.randn(shape).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for shape in ((3, 5), (), (0, 7), (1, 1, 3))
    }
    store(copy, tensors, parts=3)
    for path in copy.glob("model-*"):  # a header of odd length, as other writers leave it
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        path.write_bytes((length + 3).to_bytes(8, "little") + data[8 : 8 + length] + b"   " + data[8 + length :])
    read, expected = Shards(copy).load(list(tensors)), tensors_of(copy)
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_job_names_the_folder_and_no_path(copy, tiny_config):
    assert Job(copy, tiny_config()).base_model == "copy"
