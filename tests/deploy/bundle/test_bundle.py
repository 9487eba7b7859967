"""Bundles: complete or absent, every byte in the manifest, no pickle inside."""

import json
import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deploy.bundle.folder import verify_bundle, write_bundle
from slimgpt.checkpoints.lineage import LINEAGE, checkpoint_digest
from slimgpt.config import PruneConfig
from slimgpt.engine.pruner import prune
from slimgpt.files import locked
from tests.tiny_models import write_dense

FIGURES = {
    "metrics": {},
    "perplexity": None,
    "config": {"limit": 0},
    "dtype": "float32",
    "device": "cpu",
    "versions": {},
    "results": {},
}


def test_round_trip(bundle: Path, model: Path):
    assert verify_bundle(bundle) == []
    for file in model.iterdir():  # which has no card
        assert (bundle / "model" / file.name).read_bytes() == file.read_bytes()
    AutoModelForCausalLM.from_pretrained(bundle / "model")
    assert yaml.safe_load((bundle / "serve.yaml").read_text())["served-model-name"] == "tiny"
    assert os.access(bundle / "serve.sh", os.X_OK)
    assert list(bundle.parent.glob(".*")) == []  # no temporary folder left


def test_serve_sh_starts_through_a_link_and_with_a_python_named_from_the_callers_folder(bundle: Path, tmp_path: Path):
    (tmp_path / "start").symlink_to(bundle / "serve.sh")
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"  # one that says where it was started, and with what
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$PWD" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": "bin/python"}
    done = subprocess.run(["./start", "--port", "9"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{bundle} vllm_entry.py serve ./model --config serve.yaml --port 9\n"


def test_manifest_lists_every_file_but_itself(bundle: Path):
    present = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(json.loads((bundle / "MANIFEST.json").read_text())["files"]) == present - {"MANIFEST.json"}


def test_weights_are_not_copied_on_one_file_system(bundle: Path, model: Path):
    assert (bundle / "model/model.safetensors").samefile(model / "model.safetensors")


@pytest.mark.parametrize("name", ["model/model.safetensors", "serve.sh", "model/slim_llama.py"])
def test_one_flipped_bit_is_detected(bundle: Path, name: str):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).unlink()
    (bundle / name).write_bytes(content)
    assert verify_bundle(bundle) == [f"{name}: content differs from the manifest (sha256)"]


def test_missing_cut_and_added_files_are_detected(bundle: Path):
    (bundle / "model/tokenizer.json").unlink()
    (bundle / "README.md").write_text("cut")
    (bundle / "model/evil.py").write_text("print()")
    problems = verify_bundle(bundle)
    assert [problem.split(":")[0] for problem in problems] == ["README.md", "model/tokenizer.json", "model/evil.py"]


def test_a_folder_without_manifest_is_not_a_bundle(bundle: Path):
    whole = json.loads((bundle / "MANIFEST.json").read_text())
    entry_without = {**whole, "files": {"serve.sh": {"bytes": 1}}}
    for text in ("{", "[]", *map(json.dumps, ({**whole, "files": None}, {**whole, "files": []}, entry_without))):
        (bundle / "MANIFEST.json").write_text(text)
        assert "no readable MANIFEST.json" in verify_bundle(bundle)[0]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "original/consolidated.00.pth"])
def test_pickles_are_refused(model: Path, tmp_path: Path, name: str):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="is a pickle"):
        write_bundle(model, tmp_path / "bundle", name="tiny")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["model.gguf", "tf_model.h5", "onnx/model.onnx"])
def test_weights_in_other_formats_are_refused(model: Path, tmp_path: Path, name: str):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"weights")
    with pytest.raises(ValueError, match=f"{name} holds weights that vLLM would not read"):
        write_bundle(model, tmp_path / "bundle", name="tiny")


def test_the_card_lists_the_tensor_parallel_sizes(model: Path, tmp_path: Path):
    """Of layers with 6, 4, 3 and 8 heads; of 8 heads on 4 kv heads, which can be copied, and an FFN of 128."""
    for checkpoint, sizes in ((model, "1"), (write_dense(tmp_path / "dense"), "1, 2, 4, 8")):
        bundle = write_bundle(checkpoint, tmp_path / "bundle", name="tiny")
        assert f"that divide every layer: {sizes}.\n" in (bundle / "README.md").read_text()


def test_a_missing_shard_is_refused(model: Path, tmp_path: Path):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks 1 of its weight files, model-00002"):
        write_bundle(model, tmp_path / "bundle", name="tiny")


@pytest.mark.parametrize("name", ["slim_llama.py", "per_layer.py"])  # named by the config, imported by the first
def test_missing_code_is_refused(model: Path, tmp_path: Path, name: str):
    (model / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}, a file of the code that its config.json names"):
        write_bundle(model, tmp_path / "bundle", name="tiny")


def test_code_in_another_repository_is_refused(model: Path, tmp_path: Path):
    """The server that a bundle starts contacts no hub."""
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "org/v1.0--tokens.Tokens"]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks v1.0--tokens.py"):
        write_bundle(model, tmp_path / "bundle", name="tiny")


def test_a_model_without_weights_is_refused(model: Path, tmp_path: Path):
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no .*safetensors"):
        write_bundle(model, tmp_path / "bundle", name="tiny")


def test_a_folder_with_other_files_is_not_overwritten(model: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a slimgpt bundle"):
        write_bundle(model, tmp_path / "thesis", name="tiny")
    assert (tmp_path / "thesis/chapter1.txt").read_text() == "years of work"


@pytest.mark.parametrize("out", ["slim", "slim/bundle", "."])
def test_a_bundle_in_its_model_is_refused(model: Path, tmp_path: Path, out: str):
    with pytest.raises(ValueError, match="overlap; name a folder outside it"):
        write_bundle(model, tmp_path / out, name="tiny")


@pytest.mark.parametrize("name", ["", "two words", "a;rm -rf x", "$(x)"])
def test_names_that_a_shell_would_read_are_refused(model: Path, tmp_path: Path, name: str):
    with pytest.raises(ValueError, match="name is"):
        write_bundle(model, tmp_path / "bundle", name=name)


def test_a_failure_during_writing_leaves_nothing(model: Path, tmp_path: Path):
    (model / "README.md").mkdir()  # detected after the weights were linked, when the card is written
    (model / "README.md/notes").write_text("x")
    with pytest.raises(OSError, match="README.md"):
        write_bundle(model, tmp_path / "bundle", name="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_folders_of_killed_processes_are_removed_and_those_in_use_are_kept(model: Path, tmp_path: Path):
    left, held = tmp_path / ".bundle.partial-left", tmp_path / ".bundle.partial-held"
    for folder in (left, held):
        (folder / "model").mkdir(parents=True)
    with locked(held):
        write_bundle(model, tmp_path / "bundle", name="tiny")
    assert list(tmp_path.glob(".bundle*")) == [held]


@pytest.mark.parametrize("name", ["config.json", "evaluation.json", "pruning.json"])
def test_a_damaged_file_is_named(model: Path, tmp_path: Path, name: str):
    (model / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        write_bundle(model, tmp_path / "bundle", name="tiny")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pruned": None}, "it has no figures of the pruned model"),
        ({"dense": {}}, "the figures of the dense model have no metrics"),
        ({"pruned": {**FIGURES, "config": []}}, "the figures of the pruned model have no config"),
        ({"pruned": {**FIGURES, "metrics": {"piqa/acc": "high"}}}, "piqa/acc of the pruned model is no number"),
    ],
)
def test_damaged_figures_are_named(model: Path, tmp_path: Path, change: dict[str, object], reason: str):
    (model / "evaluation.json").write_text(json.dumps({"dense": FIGURES, "pruned": FIGURES, **change}))
    with pytest.raises(ValueError, match=f"evaluation.json is damaged: {reason}; download or copy it again"):
        write_bundle(model, tmp_path / "bundle", name="tiny")
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    config = PruneConfig(num_samples=4, seq_len=32, calibration="python", ffn_multiple=4)
    prune(write_dense(tmp_path / "dense", num_hidden_layers=2), tmp_path / "pruned", config)
    return tmp_path / "pruned"


def test_figures_of_another_model_are_refused(pruned: Path, tmp_path: Path):
    digest = checkpoint_digest(pruned)
    for other, refused in (("0" * 64, True), (digest, False)):
        figures = {"dense": {**FIGURES, "digest": ""}, "pruned": {**FIGURES, "digest": other}}
        expected = pytest.raises(ValueError, match="measured of another model") if refused else nullcontext()
        with expected:
            write_bundle(pruned, tmp_path / "bundle", name="tiny", evaluations=figures)


def test_a_model_changed_after_its_last_step_is_refused(pruned: Path, tmp_path: Path):
    shard = sorted(pruned.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, shard)  # trained on, say: as many parameters
    with pytest.raises(ValueError, match=r"changed after the last step of lineage.json \(prune\)"):
        write_bundle(pruned, tmp_path / "bundle", name="tiny")


def test_a_folder_from_before_there_was_a_lineage_is_packaged(pruned: Path, tmp_path: Path):
    (pruned / LINEAGE).unlink()
    card = (write_bundle(pruned, tmp_path / "bundle", name="tiny") / "README.md").read_text()
    assert "dense without 25." in card and "1. prune: 25." in card


def test_the_models_own_card_is_replaced_only_in_the_bundle(model: Path, tmp_path: Path):
    (model / "README.md").write_text("---\nlicense: mit\n---\nOf the original model.\n")
    bundle = write_bundle(model, tmp_path / "bundle", name="tiny")
    assert "Of the original" in (model / "README.md").read_text()  # though weights are hard links
    assert (bundle / "README.md").read_text() == (bundle / "model/README.md").read_text()
    assert "Of the original" not in (bundle / "README.md").read_text()


def test_a_cut_weight_file_is_refused(model: Path, tmp_path: Path):
    complete = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(complete[:-10])
    with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file"):
        write_bundle(model, tmp_path / "bundle", name="tiny")


def test_a_dense_model_with_the_report_of_a_pruned_one_is_refused(tmp_path: Path):
    """A reload that ignores the widths would save this: a dense model beside the report of a pruned one."""
    dense = write_dense(tmp_path / "dense")
    config = PruneConfig(ratio=0.3, calibration="python", num_samples=4, seq_len=32, ffn_multiple=4)
    report = prune(dense, tmp_path / "out", config)
    held = sum(
        tensor.numel() for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert verify_bundle(write_bundle(tmp_path / "out", tmp_path / "bundle", name="tiny")) == []
    assert held == report.parameters_after < report.parameters_before
    shutil.copy(tmp_path / "out/pruning.json", dense)
    with pytest.raises(
        ValueError, match=f"hold {report.parameters_before:,} parameters and pruning.json says {held:,}"
    ):
        write_bundle(dense, tmp_path / "again", name="tiny")
