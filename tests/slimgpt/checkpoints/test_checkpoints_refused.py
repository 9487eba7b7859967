"""Checkpoints that cannot be pruned: damaged, quantised, pickled, incomplete. Refused at once, with the remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaModel

from slimgpt.checkpoints.source import resolve_model
from slimgpt.engine.pruner import prune
from tests.slimgpt.checkpoints.found_checkpoints import (
    as_transformers_4,
    edit,
    logits,
    refusal,
    store,
    tensors_of,
)


@pytest.mark.parametrize("keep", [0, 7, 100, 5000, -1], ids="{} bytes kept".format)
def test_a_weight_file_cut_short_is_named(copy, tiny_config, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(copy, tiny_config, "is not a complete safetensors file: .*; download or copy it again")
    assert str(path) in message


def test_one_damaged_shard_is_named_before_work_starts(copy, tiny_config):
    store(copy, tensors_of(copy), parts=3)
    path = copy / "model-00003-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[9:40] = b"\xff" * 31  # the header
    path.write_bytes(data)
    assert str(path) in refusal(copy, tiny_config, "is not a complete safetensors file")


def test_a_git_lfs_pointer_is_recognised(copy, tiny_config):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9876543210\n"
    (copy / "model.safetensors").write_text(pointer)
    refusal(copy, tiny_config, "it is a pointer of git-lfs; run git lfs pull")


def test_an_index_that_is_wrong_is_refused(copy, tiny_config):
    store(copy, tensors_of(copy), parts=3)
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    at = index["weight_map"][name]
    moved = {**index["weight_map"], name: next(f for f in set(index["weight_map"].values()) if f != at)}
    cases = {
        json.dumps(index)[:-20]: "is damaged: .* line 1 column .*; download or copy it again",
        "[]": "is damaged: it holds a JSON list, not an object; download",
        "{}": "is damaged: it has no weight_map of file names; download",
        json.dumps({"weight_map": moved}): f"lacks {name}, which model.safetensors.index.json says it holds",
        json.dumps({"weight_map": {**index["weight_map"], name: "gone.safetensors"}}): "lacks 1 of its .*gone.safetens",
    }
    for text, message in cases.items():
        path.write_text(text)
        refusal(copy, tiny_config, message)


def test_two_models_in_one_folder_are_refused(copy, tiny_config):
    tensors = tensors_of(copy)
    store(copy, tensors, parts=2)
    save_file({"x": torch.zeros(1)}, copy / "model.safetensors")
    refusal(copy, tiny_config, "holds model.safetensors and an index of other files: remove the one")


@pytest.mark.parametrize(
    ("rename", "other"),
    [
        (lambda n: n.removeprefix("model."), "layers.0"),  # AutoModel.save_pretrained
        (lambda n: f"module.{n}", "module.model.layers.0"),  # DistributedDataParallel
        (lambda n: f"_orig_mod.{n}", "_orig_mod.model.layers.0"),  # torch.compile
        (lambda n: f"base_model.model.{n}", "base_model.model.model.layers.0"),  # PEFT
    ],
)
def test_weights_under_other_names_are_refused_with_both_names(copy, tiny_config, rename, other):
    store(copy, {rename(name): tensor for name, tensor in tensors_of(copy).items()})
    refusal(copy, tiny_config, rf"no tensor model.layers.0.self_attn.o_proj.weight, but {other}.*save_pretrained")


def test_weights_saved_from_the_bare_model_are_refused(copy, tmp_path, tiny_config):
    LlamaModel.from_pretrained(copy).save_pretrained(tmp_path / "bare")
    for path in copy.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "bare")
    refusal(tmp_path / "bare", tiny_config, "but layers.0.self_attn.o_proj.weight")


def test_a_lora_adapter_is_refused(copy, tiny_config, tmp_path):
    (copy / "adapter_config.json").write_text("{}")
    refusal(copy, tiny_config, "holds a LoRA adapter: merge it into its base model first")
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="holds a LoRA adapter"):
        resolve_model(copy)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hidden_size": "64"}, "Field 'hidden_size' expected int, got str"),
        ({"num_hidden_layers": None}, "Field 'num_hidden_layers' expected int, got NoneType"),
        ({"num_attention_heads": 0}, "modulo by zero"),
        ({"dtype": "floaty"}, "no attribute 'floaty'"),
        ({"model_type": []}, "unhashable type"),
        ({"per_layer_config": [], "model_type": "slim_llama"}, "'list' object has no attribute"),
    ],
)
def test_a_config_with_a_value_of_another_kind_is_named(copy, tiny_config, settings, reason):
    """Of these, transformers raises what is no ValueError."""
    edit(copy, settings)
    refusal(copy, tiny_config, f"{copy}/config.json is damaged: .*{reason}.*; download or copy it again")


def quantised(**settings):
    return {"quantization_config": settings}


# config.json of published models, as their tools write it
QUANTISED = {
    "gptq": quantised(
        bits=4,
        checkpoint_format="gptq",
        damp_percent=0.01,
        desc_act=True,
        group_size=128,
        meta={"quantizer": ["gptqmodel:1.4.5"]},
        pack_dtype="int32",
        quant_method="gptq",
        sym=True,
    ),
    "awq": quantised(
        bits=4, group_size=128, modules_to_not_convert=None, quant_method="awq", version="gemm", zero_point=True
    ),
    "fp8": quantised(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]),
    "compressed-tensors": quantised(
        config_groups={
            "group_0": {
                "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "type": "float"},
                "targets": ["Linear"],
                "weights": {"dynamic": False, "num_bits": 8, "strategy": "channel", "type": "float"},
            }
        },
        format="float-quantized",
        ignore=["lm_head"],
        quant_method="compressed-tensors",
        quantization_status="compressed",
    ),
    "bitsandbytes": quantised(
        _load_in_4bit=True,
        _load_in_8bit=False,
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="uint8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_threshold=6.0,
        load_in_4bit=True,
        load_in_8bit=False,
        quant_method="bitsandbytes",
    ),
    "mxfp4": quantised(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"]),
    "quanto": quantised(quant_method="quanto", weights="int8", activations=None, modules_to_not_convert=None),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_model_is_refused_by_its_config(copy, tiny_config, method):
    edit(copy, QUANTISED[method])
    refusal(copy, tiny_config, f"quantised .{method}.*take the full-precision model.*and quantise the result")


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_a_quantised_model_without_a_config_entry_is_refused_by_its_tensors(copy, tiny_config, dtype):
    """AutoGPTQ's quantize_config.json, AWQ's quant_config.json and MLX's keys are in files unknown to transformers."""
    tensors = tensors_of(copy)
    name = "model.layers.2.mlp.down_proj.weight"
    store(copy, tensors | {name: torch.zeros(64, 128).to(dtype)}, parts=2)
    refusal(copy, tiny_config, f"holds {name} as .*, so the model is quantised; take the full-precision model")


@pytest.mark.parametrize("shards", [1, 3])
def test_pickles_are_refused_with_a_command_that_works(twin, tmp_path, tiny_config, shards, monkeypatch):
    """Run the command from the message unchanged, in a folder with a space and a quote in its name."""
    plain, _, pruned_logits = twin(torch.bfloat16, False)
    folder = Path(shutil.copytree(plain, tmp_path / "it's a model"))
    as_transformers_4(folder)
    tensors = tensors_of(plain)
    (folder / "model.safetensors").unlink()
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    names = names if shards > 1 else ["pytorch_model.bin"]
    for i, name in enumerate(names):
        torch.save({key: t for j, (key, t) in enumerate(tensors.items()) if j % shards == i}, folder / name)
    if shards > 1:
        weight_map = {key: names[j % shards] for j, key in enumerate(tensors)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    message = refusal(
        folder, tiny_config, "holds no safetensors weights that transformers would load, only pytorch_mod"
    )
    command = message.partition("convert it: ")[2]
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    converted = tmp_path / "it's a model-safetensors"
    assert not list(converted.glob("*.bin"))
    prune(converted, tmp_path / "out", tiny_config())
    assert torch.equal(logits(tmp_path / "out"), pruned_logits)


class Payload:
    """Writes a file when it is unpickled, in place of an attacker's code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (Path(self.path), "ran")


def test_a_malicious_pickle_runs_neither_here_nor_in_the_command(copy, tmp_path, tiny_config):
    mark = tmp_path / "mark"
    (copy / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(str(mark))}, copy / "pytorch_model.bin")
    message = refusal(copy, tiny_config, "convert it: python -c")
    assert not mark.exists()
    words = [sys.executable, "-c", message.partition("python -c '")[2].rstrip("'")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert not mark.exists()
    torch.load(copy / "pytorch_model.bin", weights_only=False)  # the payload is real
    assert mark.exists()


@pytest.mark.parametrize("name", ["model.Q4_K_M.gguf", "consolidated.safetensors", "consolidated.00.pth"])
def test_folders_with_only_other_formats_are_refused_by_name(copy, tiny_config, name):
    (copy / "model.safetensors").rename(copy / name)
    assert "convert it" not in refusal(copy, tiny_config, f"no safetensors weights .*, only {name}")
    (copy / name).unlink()
    assert refusal(copy, tiny_config, "holds no safetensors weights").endswith("holds no safetensors weights")
