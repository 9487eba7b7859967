"""A GGUF file as a model: the weights it holds, and the tokens that llama.cpp makes."""

import shutil

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.llamacpp.export import export, plan_export
from slimgpt.checkpoints.headers import read_json
from slimgpt.checkpoints.source import resolve_model
from slimgpt.config import PruneConfig
from slimgpt.engine.pruner import prune
from slimgpt.files import json_bytes, locked
from tests.tiny_families import write_family
from tests.tiny_models import write_dense

pytest.importorskip("llama_cpp_py_sync", reason="it has no wheel for this machine")
from tests.deploy.llamacpp.runtime import LlamaCpp
from tests.deploy.llamacpp.test_vocabulary import TEXTS, byte_level, sentence_piece, write_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / "cache"))


def to_gguf(folder, kind="f16"):
    """The model as a file beside its folder."""
    return export(plan_export(folder, kind), folder.with_suffix(".gguf"))


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3"])
def test_weights_come_back(case, tmp_path):
    """In 16 bits, rows of queries and keys in their places again, tied or not; converted once."""
    # transformers takes a Qwen3's heads for 128 wide, whatever the file says; all published ones are
    folder = write_family(tmp_path / case, case, **({"head_dim": 128} if case == "qwen3" else {}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    converted = resolve_model(to_gguf(folder))
    again = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.bfloat16)
    for (name, mine), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        # f16 has too few small exponents for some of bfloat16's weights near 0
        assert torch.allclose(mine, theirs, rtol=0, atol=2**-24), name
    ids = torch.arange(1, 30)[None]
    assert torch.allclose(model.float()(ids).logits, again.float()(ids).logits, atol=0.01)  # norms' epsilon is rounded
    before = (converted / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(folder.with_suffix(".gguf")) == converted
    assert resolve_model(folder.with_suffix(".gguf").rename(folder.with_suffix(".GGUF"))) == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == before
    assert list(converted.parent.iterdir()) == [converted]


def test_what_a_killed_conversion_left_is_removed_and_what_another_writes_is_kept(tmp_path):
    """Gigabytes, of a real model; they would lie in the cache for ever."""
    file = to_gguf(write_dense(tmp_path / "model"))
    converted = resolve_model(file)
    shutil.rmtree(converted)
    left, held = (converted.with_name(f".{converted.name}.partial-{which}") for which in ("left", "held"))
    for folder in (left, held):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    with locked(held):
        assert resolve_model(file) == converted
    assert sorted(converted.parent.iterdir()) == [held, converted]


def test_linear_rotary_scaling(tmp_path):
    """transformers leaves it in the file and would read every position wrong."""
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    folder = write_dense(tmp_path / "model", rope_parameters=rope)
    assert read_json(resolve_model(to_gguf(folder)) / "config.json")["rope_parameters"] == rope


def test_another_rotary_scaling(tmp_path):
    """As llama.cpp's converter writes a Qwen with YaRN."""
    file = to_gguf(
        write_dense(tmp_path / "model", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    )
    said = file.read_bytes()
    assert said.count(b"linear") == 1
    file.write_bytes(said.replace(b"\x06\0\0\0\0\0\0\0linear", b"\x06\0\0\0\0\0\0\0dynaml"))
    with pytest.raises(ValueError, match="stretches its rotary embedding by dynaml, which is not read"):
        resolve_model(file)


def test_rotary_factors_without_a_name(tmp_path):
    """A scaling that LLaMA 3's formula does not give would compute something else, in silence."""
    folder = write_family(tmp_path / "model", "llama3")
    config = read_json(folder / "config.json")
    config["rope_parameters"]["high_freq_factor"] = 7.0
    (folder / "config.json").write_bytes(json_bytes(config))
    with pytest.raises(ValueError, match=r"model\.gguf scales its rotary embedding otherwise than LLaMA 3"):
        resolve_model(to_gguf(folder))


def test_a_quantised_file_prunes(tmp_path):
    """As users have them: blocks of 4 to 8 bits, de-quantised, pruned, and a file again."""
    file = to_gguf(write_dense(tmp_path / "dense", hidden_size=256, intermediate_size=256), "q4_k_m")
    converted = resolve_model(file)
    config = read_json(converted / "config.json")
    assert (config["dtype"], config["dequantized_from"]) == ("bfloat16", "dense.gguf (Q4_K_M)")
    config = PruneConfig(ratio=0.25, ffn_multiple=8, calibration="python", num_samples=4, seq_len=48)
    report = prune(converted, tmp_path / "out", config)
    assert report.ratio == pytest.approx(0.25, abs=0.005)
    assert read_json(tmp_path / "out/config.json")["dequantized_from"] == "dense.gguf (Q4_K_M)"
    runtime = LlamaCpp(to_gguf(tmp_path / "out"))
    assert runtime.logits([1, 2, 3]).shape == (3, 512)
    runtime.close()


def assert_same_tokens(folder):
    """Converted from its file, the tokenizer makes the tokens that llama.cpp makes of the same file."""
    file = to_gguf(folder)
    runtime, tokenizer = LlamaCpp(file), AutoTokenizer.from_pretrained(resolve_model(file))
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == runtime.tokens(text), text
    runtime.close()
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces(prefix, tmp_path):
    """BOS and the blank in front, which transformers does not read from the file."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = write_model(tmp_path / "model", sentence_piece(prefix=prefix), vocab_size=620, **tokens)
    assert assert_same_tokens(folder)("a")["input_ids"][0] == 1


def test_single_digits(tmp_path):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    folder = write_model(tmp_path / "model", byte_level(digits), eos_token="<|end|>")
    tokenizer = assert_same_tokens(folder)
    assert [tokenizer.decode(i) for i in tokenizer("½ 12")["input_ids"]][-2:] == ["1", "2"]


def test_what_is_not_a_model(tmp_path):
    """Each in one line."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="a.gguf is damaged, or no GGUF file"):
        resolve_model(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="b.gguf is damaged, or no GGUF file"):
        resolve_model(tmp_path / "b.gguf")
    with pytest.raises(FileNotFoundError, match=r"no folder .*c\.gguf"):
        resolve_model(tmp_path / "c.gguf")
    whole = to_gguf(write_dense(tmp_path / "dense"))
    shutil.copy(whole, tmp_path / "d.gguf")
    with (tmp_path / "d.gguf").open("r+b") as file:
        file.truncate(whole.stat().st_size - 5000)
    with pytest.raises(ValueError, match=r"d\.gguf cannot be read by transformers: .*; .* download it again"):
        resolve_model(tmp_path / "d.gguf")
    assert not list((tmp_path / "cache" / "gguf").glob("*"))


def test_a_pruned_file_cannot_be_read_back(tmp_path):
    """transformers knows no deci: said in one line."""
    dense = write_dense(tmp_path / "dense")
    config = PruneConfig(ratio=0.3, ffn_multiple=8, calibration="python", num_samples=4, seq_len=48)
    prune(dense, tmp_path / "out", config)
    file = to_gguf(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out\.gguf cannot be read by transformers: .*deci"):
        resolve_model(file)
