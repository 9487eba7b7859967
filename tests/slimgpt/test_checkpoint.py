"""Reading checkpoints as users have them, and refusing what cannot be trusted."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from slimgpt.checkpoint import Journal, Shards, write_shard
from slimgpt.plan import Job
from slimgpt.pruner import prune


def test_one_file_and_many_with_an_index_read_alike(dense, dense_mha):
    single, sharded = Shards(dense), Shards(dense_mha)
    assert len(set(single.files.values())) == 1
    assert len(set(sharded.files.values())) > 1
    names = sharded.names("model.layers.1.")
    expected = {}
    for path in dense_mha.glob("*.safetensors"):
        expected |= load_file(path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sharded.load(names).items())
    assert sharded.shape("lm_head.weight") == ([512, 64], torch.float32)


def test_pickles_and_missing_weights_are_refused_with_the_remedy(dense, tmp_path):
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    with pytest.raises(ValueError, match="no safetensors weights: none"):
        Shards(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickles .pytorch_model.bin.*save_pretrained"):
        Shards(tmp_path)


def test_an_index_that_names_a_missing_file_is_refused(dense_mha, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dense_mha, folder)
    min(folder.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="lacks 1 of its weight files"):
        Shards(folder)


def test_a_weight_of_another_shape_than_the_config_says_is_named(dense, tmp_path, tiny_config):
    folder = tmp_path / "copy"
    shutil.copytree(dense, folder)
    data = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 144}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"layer 0: mlp.down_proj.weight has shape \(64, 128\).*asks for \(64, 144\)"):
        prune(folder, tmp_path / "out", tiny_config())


def test_a_layer_without_one_of_its_weights_is_named(dense, tmp_path, tiny_config):
    folder = tmp_path / "copy"
    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    write_shard(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"layer 1: self_attn.k_proj.weight has shape None"):
        prune(folder, tmp_path / "out", tiny_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not supported; supported: llama"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised .gptq.*full-precision"),
    ],
)
def test_models_that_cannot_be_pruned_are_refused_before_work(dense, tmp_path, tiny_config, change, message):
    folder = tmp_path / "copy"
    shutil.copytree(dense, folder)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Job(folder, tiny_config())


def test_a_tied_head_that_was_stored_all_the_same_is_not_written_again(dense, tmp_path, tiny_config):
    folder = tmp_path / "copy"
    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_shard(folder / "model.safetensors", tensors)
    prune(folder, tmp_path / "out", tiny_config())
    assert "lm_head.weight" not in Shards(tmp_path / "out").files


def test_a_config_written_by_transformers_4_gives_the_same_model(dense, tmp_path, tiny_config):
    """torch_dtype, rope_theta at the top level, no head_dim key where it can be derived."""
    folder = tmp_path / "old"
    shutil.copytree(dense, folder)
    data = json.loads((folder / "config.json").read_text())
    data["rope_theta"] = data.pop("rope_parameters")["rope_theta"]
    data["torch_dtype"] = data.pop("dtype")
    (folder / "config.json").write_text(json.dumps(data))
    new = prune(dense, tmp_path / "new_out", tiny_config())
    old = prune(folder, tmp_path / "old_out", tiny_config())
    assert [x.kept_channels for x in old.layers] == [x.kept_channels for x in new.layers]
    assert json.loads((tmp_path / "old_out" / "config.json").read_text())["rope_parameters"]["rope_theta"] == 10000.0


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
