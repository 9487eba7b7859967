"""Reading layers one by one, and the journal. For checkpoints as users have them: test_checkpoints_as_found.py."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from slimgpt.checkpoints.shards import Shards, write_shard
from slimgpt.engine.job import Job
from slimgpt.engine.journal import Journal
from slimgpt.engine.pruner import prune


def test_one_file_and_shards_with_an_index_give_the_same_tensors(dense, dense_mha):
    single, sharded = Shards(dense), Shards(dense_mha)
    assert len(set(single.files.values())) == 1
    assert len(set(sharded.files.values())) > 1
    names = sharded.names("model.layers.1.")
    expected = {}
    for path in dense_mha.glob("*.safetensors"):
        expected |= load_file(path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sharded.load(names).items())
    assert sharded.shape("lm_head.weight") == ([512, 64], torch.float32)


def test_a_weight_whose_shape_differs_from_the_config_is_named(dense, tmp_path, tiny_config):
    folder = tmp_path / "copy"
    shutil.copytree(dense, folder)
    data = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 144}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj.weight is \[64, 128\] and not \[64, 144\], which"):
        prune(folder, tmp_path / "out", tiny_config())


def test_a_layer_without_one_of_its_weights_is_named(dense, tmp_path, tiny_config):
    folder = tmp_path / "copy"
    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    write_shard(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match="has no tensor model.layers.1.self_attn.k_proj.weight, which its config"):
        prune(folder, tmp_path / "out", tiny_config())


def test_an_unsupported_architecture_is_refused_before_work_starts(dense, tmp_path, tiny_config):
    folder = tmp_path / "copy"
    shutil.copytree(dense, folder)
    data = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="architecture 'gpt2' is not supported; supported: llama"):
        Job(folder, tiny_config())


def test_the_digest_changes_with_any_byte(dense, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dense, folder)
    before = Shards(folder).digest()
    assert before == Shards(dense).digest()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert Shards(folder).digest() != before


def test_the_journal_ends_at_the_first_damaged_line(tmp_path):
    journal = Journal(tmp_path)
    for i in range(4):
        journal.append({"part": i})
    lines = journal.path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"part": 2', b'"part": 9')
    journal.path.write_bytes(b"".join(lines))
    assert journal.read() == [{"part": 0}, {"part": 1}]
