"""Interrupted, killed and damaged runs: no loss, no partial file that looks complete, a bit-identical result."""

import hashlib
import json
import random
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slimgpt.checkpoints.source import resolve_model
from slimgpt.config import PruneConfig
from slimgpt.device import resolve_device
from slimgpt.engine.journal import Journal
from slimgpt.engine.pruner import prune
from slimgpt.report import load_report
from tests import processes


def model_files(folder):
    """sha256 of all that makes the model; journal, report and lineage hold seconds, which differ."""
    names = [p for p in sorted(folder.iterdir()) if p.name not in ("journal.jsonl", "pruning.json", "lineage.json")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


class CrashError(Exception):
    """Stands for anything that ends a run between two layers."""


def crash_after(layers):
    def on_layer(report, _):
        if report.layer == layers - 1:
            raise CrashError

    return on_layer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, dense, tiny_config):
    """An uninterrupted run."""
    config = tiny_config()
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    prune(dense, out, config)
    return config, out


def interrupted(dense, out, config, layers=2):
    with pytest.raises(CrashError):
        prune(dense, out, config, on_layer=crash_after(layers))


def test_an_interrupted_run_resumes_and_is_bit_identical(dense, tmp_path, uninterrupted):
    config, reference = uninterrupted
    interrupted(dense, tmp_path / "out", config)
    with pytest.raises(ValueError, match="no config.json"):
        resolve_model(tmp_path / "out")  # nothing takes it for a model
    report = prune(dense, tmp_path / "out", config)
    assert report.replayed_layers == 2
    assert model_files(tmp_path / "out") == model_files(reference)


def test_an_interrupted_run_in_bfloat16_is_bit_identical(dense, tmp_path, tiny_config):
    """Its products are another library's than those of float32."""
    config = tiny_config(dtype="bfloat16", device="cpu")
    prune(dense, tmp_path / "reference", config)
    interrupted(dense, tmp_path / "out", config)
    assert prune(dense, tmp_path / "out", config).replayed_layers == 2
    assert model_files(tmp_path / "out") == model_files(tmp_path / "reference")
    with pytest.raises(FileExistsError, match="dtype was bfloat16, now float32"):
        prune(dense, tmp_path / "out", replace(config, dtype="float32"))


@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "gone", "torn journal", "empty journal line"])
def test_damage_is_detected_and_the_layer_is_pruned_again(dense, tmp_path, uninterrupted, damage):
    config, reference = uninterrupted
    out = tmp_path / "out"
    interrupted(dense, out, config)
    shard, journal = out / "model-00003-of-00006.safetensors", out / "journal.jsonl"
    data = bytearray(shard.read_bytes())
    if damage == "flipped bit":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "truncated":
        shard.write_bytes(data[:-100])
    elif damage == "gone":
        shard.unlink()
    elif damage == "torn journal":
        journal.write_bytes(journal.read_bytes()[:-40])
    else:
        journal.write_bytes(journal.read_bytes() + b'{"part": "layer 2", "fi')
    report = prune(dense, out, config)
    assert report.replayed_layers == (2 if damage == "empty journal line" else 1)
    assert model_files(out) == model_files(reference)


def test_a_finished_run_is_not_repeated(dense, tmp_path, uninterrupted):
    config, reference = uninterrupted
    before = {p.name: p.stat().st_mtime_ns for p in reference.glob("*.safetensors")}
    assert prune(dense, reference, config) == load_report(reference)
    assert {p.name: p.stat().st_mtime_ns for p in reference.glob("*.safetensors")} == before


@pytest.mark.parametrize("lost", ["lineage.json", "tokenizer.json", "pruning.json", "model.safetensors.index.json"])
def test_what_a_finished_run_has_lost_beside_its_weights_is_written_again(dense, tmp_path, uninterrupted, lost):
    config, reference = uninterrupted
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    (out / lost).unlink()
    weights = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert prune(dense, out, config).replayed_layers == len(load_report(reference).layers)
    assert (out / lost).is_file() and model_files(out) == model_files(reference)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == weights


def test_a_finished_run_whose_config_was_changed_since_gets_it_back(dense, tmp_path, uninterrupted):
    config, reference = uninterrupted
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    (out / "config.json").write_text(
        (out / "config.json").read_text().replace('"rms_norm_eps": 1e-', '"rms_norm_eps": 3e-')
    )
    assert model_files(out) != model_files(reference)
    prune(dense, out, config)
    assert model_files(out) == model_files(reference)


def test_the_same_weights_under_another_config_are_another_model(copy, tmp_path, tiny_config):
    """Rotary base, norms, scales: what a model computes is in its config, too."""
    config = tiny_config()
    interrupted(copy, tmp_path / "out", config)
    data = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**data, "rms_norm_eps": 0.05}))
    with pytest.raises(FileExistsError, match="holds another pruning: model was"):
        prune(copy, tmp_path / "out", config)


def test_another_config_model_calibration_version_or_number_of_threads_on_the_same_out_is_refused(
    dense, dense_mha, tmp_path, tiny_config, monkeypatch
):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 400)
    config = tiny_config(calibration=str(text), device="cpu")  # where threads count
    interrupted(dense, tmp_path / "out", config)
    before = model_files(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"ratio was 0.3, now 0.4"):
        prune(dense, tmp_path / "out", replace(config, ratio=0.4))
    with pytest.raises(FileExistsError, match="seed was 0, now 1"):
        prune(dense, tmp_path / "out", replace(config, seed=1))
    with pytest.raises(FileExistsError, match="model was"):
        prune(dense_mha, tmp_path / "out", config)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(FileExistsError, match=f"now {threads + 1}; set OMP_NUM_THREADS={threads} to resume it"):
            prune(dense, tmp_path / "out", config)
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr("slimgpt.equal_bits.mkl_mode", lambda: "another")
        with pytest.raises(FileExistsError, match=r"mkl was .*, now another; import slimgpt's engine before torch"):
            prune(dense, tmp_path / "out", config)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.__version__", "1.0")
        with pytest.raises(FileExistsError, match=r"now 1\.0; install transformers==.* to resume it"):
            prune(dense, tmp_path / "out", config)
    with monkeypatch.context() as patch:
        patch.setattr("slimgpt.files.code_digest", lambda: "other")
        with pytest.raises(FileExistsError, match="code was .*, now other; take the version of slimgpt that began it"):
            prune(dense, tmp_path / "out", config)
    text.write_text("a lazy dog sleeps here " * 400)
    with pytest.raises(FileExistsError, match="holds another pruning: calibration was"):
        prune(dense, tmp_path / "out", config)
    assert model_files(tmp_path / "out") == before


def test_a_folder_with_other_files_is_not_touched(dense, tmp_path, tiny_config):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        prune(dense, tmp_path / "out", tiny_config())
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [("thesis.txt", "mine")]


def test_a_second_process_on_one_out_is_refused(dense, tmp_path, tiny_config):
    def second(report, _):
        with pytest.raises(BlockingIOError, match="another process"):
            prune(dense, tmp_path / "out", tiny_config())
        raise CrashError

    with pytest.raises(CrashError):
        prune(dense, tmp_path / "out", tiny_config(), on_layer=second)


def test_kill_9_at_any_moment_loses_nothing(dense, tmp_path, uninterrupted):
    """Twenty kills, each at a random call of a run, on folders in every state; then one run to the end."""
    config, reference = uninterrupted
    calls = _prune_in_process(dense, tmp_path / "counted", config, kill_at=0)
    chance = random.Random(0)
    for kill in range(20):
        assert _prune_in_process(dense, tmp_path / f"out{kill % 4}", config, kill_at=chance.randint(1, calls)) in (
            0,
            -9,
        )
    for i in range(4):
        prune(dense, tmp_path / f"out{i}", config)
        assert model_files(tmp_path / f"out{i}") == model_files(reference)


def _prune_in_process(dense, out, config, *, kill_at):
    """Prune in a process that kills itself at its ``kill_at``-th call. Its exit code; for 0, how many calls it made."""
    answer = processes.queue()
    process = processes.start(_prune_counting_calls, dense, out, config, kill_at, answer)
    calls = answer.get(timeout=300) if kill_at == 0 else None
    process.join(300)
    return calls if kill_at == 0 else process.exitcode


def _prune_counting_calls(dense, out, config, kill_at, answer):
    calls = processes.signal_self_at_call(signal.SIGKILL, kill_at)
    prune(dense, out, config)
    sys.setprofile(None)
    answer.put(calls[0])


@pytest.mark.slow
@pytest.mark.all
def test_kill_9_of_a_run_on_smollm2_loses_nothing(tmp_path):
    model = resolve_model("smollm2")
    config = PruneConfig(ratio=0.25, calibration="python", num_samples=2, seq_len=64)
    prune(model, tmp_path / "uninterrupted", config)
    out = tmp_path / "out"
    process = processes.start(prune, model, out, config)
    layers = random.Random().randint(3, 24)
    while process.is_alive() and len(Journal(out).read()) <= layers + 1:  # the first two lines are no layers
        process.join(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "config.json").exists()
    assert prune(model, out, config).replayed_layers >= layers
    assert model_files(out) == model_files(tmp_path / "uninterrupted")


def test_settings_without_effect_on_the_result_may_differ_on_resume(dense, tmp_path, uninterrupted):
    config, reference = uninterrupted
    interrupted(dense, tmp_path / "out", replace(config, activations="disk"))
    text = tmp_path / "same.txt"
    text.write_bytes(Path(config.calibration).read_bytes())
    same_device = resolve_device("auto").type
    changed = replace(config, calibration=str(text), device=same_device, dtype="float32", keep_gib=0)
    assert prune(dense, tmp_path / "out", changed).replayed_layers == 2
    assert model_files(tmp_path / "out") == model_files(reference)


def test_a_damaged_report_is_named(uninterrupted, tmp_path):
    _, reference = uninterrupted
    for text in ("{", "{}", (reference / "pruning.json").read_text().replace('"ffn_error"', '"ffn_loss"')):
        (tmp_path / "pruning.json").write_text(text)
        with pytest.raises(ValueError, match="damaged or of another version"):
            load_report(tmp_path)
