"""Where a model comes from, and the errors where there is none."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimgpt.checkpoints.source import cache_folder, resolve_model


def test_a_folder_resolves_to_itself(dense):
    assert resolve_model(str(dense)) == dense


@pytest.mark.parametrize("model", ["folder", "model.gguf", "smollm2"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(model, dense, tmp_path, monkeypatch):
    """It would be ignored, and another state of the model pruned than the user asked for."""
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    named = {"folder": dense, "model.gguf": tmp_path / "model.gguf"}.get(model, model)
    with pytest.raises(ValueError, match="revision is 'v2', and .* is not on the hub, which alone has them; leave it"):
        resolve_model(named, revision="v2")
    assert not (tmp_path / "cache").exists()


def test_the_built_in_model_is_real_and_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path))
    folder = resolve_model("smollm2")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("smollm2") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.bfloat16
    answer = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    assert "Paris" in tokenizer.decode(answer[0])
    assert tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no folder nowhere; name a model folder, a GGUF file, a hub id"),
        ("./models/missing", "no folder ./models/missing"),
        ("a" * 300, "no folder aaa.*; name a model folder"),
        ("no/" + "a" * 300, "no folder no/aaa"),
        ("a\0b", "no folder a.b; name a model folder"),
        ("~nobody-of-that-name/model", "no folder ~nobody-of-that-name/model; name a model folder"),
    ],
)
def test_a_missing_folder_is_refused(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        resolve_model(name)


def test_an_empty_name_is_not_the_current_folder(dense, monkeypatch):
    """As of a shell's variable that is not set, or of a form's field that was emptied."""
    monkeypatch.chdir(dense)
    with pytest.raises(ValueError, match="the model's name is empty; name a model folder"):
        resolve_model("")
    assert resolve_model(".") == resolve_model(Path()) == Path()


def test_an_unfinished_folder_is_not_a_model(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        resolve_model(tmp_path)


def test_an_unreachable_hub_is_reported_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no folder some-org/some-model, and the hub cannot be reached"):
        resolve_model("some-org/some-model")


def test_the_cache_is_below_home_also_where_no_shell_wrote_it_out(monkeypatch, tmp_path):
    """A file of variables, for docker or systemd, holds ``~`` as it stands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SLIMGPT_CACHE", "~/models")
    assert cache_folder() == tmp_path / "models"
    monkeypatch.delenv("SLIMGPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/kept")
    assert cache_folder() == tmp_path / "kept/slimgpt"


def test_a_user_without_a_home_needs_a_cache_that_is_named(monkeypatch, tmp_path):
    """A container's, whose number is in no list of users."""
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    for name in ("HOME", "SLIMGPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="this user has no home folder; set SLIMGPT_CACHE to a folder"):
        cache_folder()
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
