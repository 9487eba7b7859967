"""Trainings that are interrupted, killed, torn or run side by side: the same bytes as one that was left alone."""

import json
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from slimgpt.checkpoints.lineage import load_lineage
from slimgpt.recovery.job import RecoveryJob
from slimgpt.recovery.output import STATES
from slimgpt.recovery.recoverer import recover
from slimgpt.recovery.training import STATE, WRITTEN, newest, seconds_until
from tests import processes
from tests.slimgpt.engine.test_ranks import torchrun
from tests.slimgpt.engine.test_resume import model_files


class CrashError(Exception):
    """Stands for anything that ends a run."""


@pytest.mark.parametrize("step", [3, 8, 13, 20])
def test_an_interrupted_run_goes_on_and_is_bit_identical(step, pruned, dense, config, tmp_path, recovered):
    def crash(at, *_):
        if at == step:
            raise CrashError

    with pytest.raises(CrashError):
        recover(pruned, tmp_path / "out", config, teacher=dense, on_step=crash)
    assert not (tmp_path / "out" / "config.json").exists()
    steps = []
    recover(pruned, tmp_path / "out", config, teacher=dense, on_step=lambda at, *_: steps.append(at))
    assert model_files(tmp_path / "out") == model_files(recovered)
    assert min(steps) == (step - 1) // 8 * 8  # a state is kept each 8 steps, after what is told of the step
    steps.clear()
    recover(pruned, tmp_path / "out", config, teacher=dense, on_step=lambda at, *_: steps.append(at))
    assert steps == []  # finished


def test_the_seconds_are_those_of_all_processes_that_worked_on_it(pruned, dense, config, tmp_path):
    def crash(at, *_):
        if at == 13:
            raise CrashError

    with pytest.raises(CrashError):
        recover(pruned, tmp_path / "out", config, teacher=dense, on_step=crash)
    state = newest(tmp_path / "out" / STATES)
    assert 0 < seconds_until(state) < 1000
    written = json.loads((state / WRITTEN).read_text())
    (state / WRITTEN).write_text(json.dumps({**written, "seconds": 1000.0}))
    figures = recover(pruned, tmp_path / "out", config, teacher=dense).lineage.steps[-1].figures
    assert 1000 < figures["seconds"] < 2000


def test_two_threads_at_once_give_what_each_gives_alone(pruned, dense, config, tmp_path, recovered):
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(recover, pruned, tmp_path / name, config, teacher=dense) for name in "ab"]
    for made in both:
        assert model_files(made.result().folder) == model_files(recovered)


def test_torchrun_shares_the_sequences_out(pruned, dense, config, text_file, tmp_path, recovered):
    flags = ["--teacher", dense, "--tokens", 2560, "--text", text_file, "--seq-len", 32]
    flags += ["--batch-size", 4, "--learning-rate", 0.004, "--held-out", 4, "--dtype", "float32"]
    done = torchrun("recover", pruned, tmp_path / "two", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    one, two = (load_lineage(folder).steps[-1].figures for folder in (recovered, tmp_path / "two"))
    assert two["kl_before"] == pytest.approx(one["kl_before"], rel=1e-4)
    assert two["kl_after"] == pytest.approx(one["kl_after"], rel=1e-2)


@pytest.mark.parametrize("how", ["moved", "by a link"])
def test_a_folder_under_another_path_goes_on(how, pruned, dense, config, tmp_path, recovered):
    """Its states name the best one by a path."""

    def crash(at, *_):
        if at == 13:
            raise CrashError

    with pytest.raises(CrashError):
        recover(pruned, tmp_path / "out", config, teacher=dense, on_step=crash)
    if how == "moved":
        (tmp_path / "out").rename(tmp_path / "other")
    else:
        (tmp_path / "other").symlink_to(tmp_path / "out")
    best = json.loads((newest(tmp_path / "other" / STATES) / STATE).read_text())["best_model_checkpoint"]
    assert Path(best).is_dir()  # Trainer reads it in the end, where no later one is better
    steps = []
    recover(pruned, tmp_path / "other", config, teacher=dense, on_step=lambda at, *_: steps.append(at))
    assert min(steps) == 8
    assert model_files(tmp_path / "other") == model_files(recovered)


@pytest.mark.parametrize("lost", ["lineage.json", "model.safetensors.index.json"])
def test_a_finished_folder_that_has_lost_a_file_is_not_said_to_be_written(
    lost, pruned, dense, config, tmp_path, recovered
):
    out = Path(shutil.copytree(recovered, tmp_path / "out"))
    (out / lost).unlink()
    with pytest.raises(FileExistsError, match="holds a finished training.* or name another OUT"):
        recover(pruned, out, config, teacher=dense)


@pytest.mark.parametrize("size", [40, 120, 400, 700])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    size, pruned, dense, config, small_disk, recovered, monkeypatch
):
    """What is checked before is taken away meanwhile."""
    monkeypatch.setattr(RecoveryJob, "check_space", lambda *_: None)
    with small_disk(f"{size}k") as disk:
        with pytest.raises(OSError, match="could not be written to .*make room there and run the same command again"):
            recover(pruned, disk / "out", config, teacher=dense)
        subprocess.run(["mount", "-o", "remount,size=50M", disk], check=True)
        recover(pruned, disk / "out", config, teacher=dense)
        assert model_files(disk / "out") == model_files(recovered)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors", "trainer_state.json"])
def test_a_torn_state_is_not_gone_on_from(name, pruned, dense, config, tmp_path, recovered):
    """As a loss of power leaves it."""

    def crash(at, *_):
        if at == 13:
            raise CrashError

    with pytest.raises(CrashError):
        recover(pruned, tmp_path / "out", config, teacher=dense, on_step=crash)
    (tmp_path / "out" / "training" / "checkpoint-8" / name).write_bytes(b"")
    recover(pruned, tmp_path / "out", config, teacher=dense)
    assert model_files(tmp_path / "out") == model_files(recovered)


def _recover(pruned, out, config, dense):
    recover(pruned, out, config, teacher=dense)


def test_a_run_that_is_killed_at_any_moment_goes_on(pruned, dense, config, tmp_path, recovered):
    out, chance = tmp_path / "out", random.Random(0)
    for _ in range(4):
        process = processes.start(_recover, pruned, out, config, dense)
        process.join(chance.uniform(1, 8))
        process.kill()
        process.join()
    recover(pruned, out, config, teacher=dense)
    assert model_files(out) == model_files(recovered)


def test_another_run_is_not_gone_on_with(pruned, dense, config, tmp_path, recovered):
    with pytest.raises(FileExistsError, match="holds another training: rank was 16, now 8; name another OUT"):
        recover(pruned, recovered, replace(config, rank=8), teacher=dense)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"not an output of slimgpt recover \(it holds notes.txt\)"):
        recover(pruned, tmp_path, config, teacher=dense)


def test_with_dropout_too_an_interrupted_run_is_bit_identical(pruned, as_in_the_paper, tmp_path):
    config = replace(as_in_the_paper, tokens="20k")  # several times through the text
    recover(pruned, tmp_path / "one", config)

    def crash(at, *_):
        if at == 10:
            raise CrashError

    with pytest.raises(CrashError):
        recover(pruned, tmp_path / "two", config, on_step=crash)
    recover(pruned, tmp_path / "two", config)
    assert model_files(tmp_path / "one") == model_files(tmp_path / "two")
