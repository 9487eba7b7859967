"""Ctrl-C, SIGTERM and a full disk: a one-line error, no partial file looks complete, the same command resumes."""

import os
import random
import shutil
import signal
import sys

import pytest

from flows.cli import app as cli
from flows.cli.interrupts import Stopped, listening
from slimgpt.engine.pruner import prune
from tests import processes

from .test_resume import model_files


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, dense, tiny_config):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    prune(dense, out, tiny_config())
    return out


def _prune_signalled(dense, out, text, number, at_call, err, counts):
    """``slimgpt prune`` in a process that signals itself at its ``at_call``-th call."""
    with err.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  the forkserver's own is another file
    small = "--ratio 0.3 --schedule log --ffn-multiple 4 --num-samples 8 --seq-len 64 --block-tokens 128 --calibration"
    sys.argv = ["slimgpt", "prune", str(dense), str(out), *small.split(), str(text)]
    calls = processes.signal_self_at_call(number, at_call)
    try:
        cli.main()
    finally:
        sys.setprofile(None)
        counts.put(calls[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_any_moment_gives_a_one_line_error_and_the_next_run_resumes(
    dense, tmp_path, text_file, uninterrupted, tiny_config, number, code
):
    counts, outs = processes.queue(), [tmp_path / "out0"]

    def run(folder, at_call):
        arguments = (dense, folder, text_file, number, at_call, tmp_path / "err", counts)
        process = processes.start(_prune_signalled, *arguments)
        process.join(120)
        return process.exitcode, (tmp_path / "err").read_text().replace("\r", "\n")

    assert run(tmp_path / "counted", 0)[0] == 0
    calls = counts.get(timeout=10)
    chance, stopped = random.Random(int(number)), 0
    for _ in range(12):
        out = outs[-1]
        exitcode, err = run(out, chance.randint(calls // 2, calls))
        if (out / "config.json").exists():  # too late: the next run starts afresh
            outs.append(tmp_path / f"out{len(outs)}")
            continue
        if not (out / "journal.jsonl").exists():
            continue  # the command line was being read
        stopped += 1
        assert exitcode == code
        errors = [line for line in err.splitlines() if line and not line.startswith("prune:")]
        assert len(errors) == 1
        assert errors[0].startswith("error: interrupted ")
        assert errors[0].endswith("; finished layers are kept: run the same command again to resume")
    assert stopped > 1
    for out in outs:
        prune(dense, out, tiny_config())
        assert model_files(out) == model_files(uninterrupted)


def test_a_library_that_fails_because_the_signal_met_it_halfway_hides_nothing():
    """As torch does between the two halves of ``with torch.device``."""

    def met_halfway(interrupts):
        try:
            interrupts.signalled(signal.SIGINT)
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    with pytest.raises(Stopped, match="before the first layer"), listening() as interrupts:
        met_halfway(interrupts)


def test_the_error_names_the_layer():
    with listening() as interrupts:
        interrupts.unit_done(16, 30)
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
    assert stopped.value.args[0].startswith("interrupted at layer 17 of 30; finished layers are kept")
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_one_of_several_processes_stops_at_the_end_of_a_layer():
    with listening() as interrupts:
        interrupts.alone = False
        interrupts.unit_done(2, 30)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped, match="at layer 4 of 30"):
            interrupts.unit_done(3, 30)


@pytest.mark.parametrize("kib_left", [0, 100, 140])
def test_a_disk_that_fills_during_the_run_gives_a_one_line_error_and_the_next_run_resumes(
    dense, uninterrupted, tiny_config, small_disk, kib_left
):
    """The next shard takes 144 KiB."""
    with small_disk("20M") as disk:
        with pytest.raises(
            OSError, match=r"could not be written to .*out: .* MB free.*run the same command again"
        ) as full:
            prune(dense, disk / "out", tiny_config(), on_layer=_fill(disk, after=1, kib_left=kib_left))
        assert "\n" not in str(full.value)
        assert not (disk / "out" / "config.json").exists()
        (disk / "filler").unlink()
        report = prune(dense, disk / "out", tiny_config())
        assert report.replayed_layers >= 1
        assert model_files(disk / "out") == model_files(uninterrupted)


def test_a_disk_that_fills_within_a_line_of_the_journal_loses_no_layer_before_it(
    dense, uninterrupted, tiny_config, small_disk
):
    """The next shard just fits. Its journal line, in one case at least, does not: it is torn at the end of a page."""
    torn = 0
    for after in (1, 2, 3):
        shard = uninterrupted / f"model-{after + 2:05d}-of-00006.safetensors"
        with small_disk("20M") as disk:
            fill = _fill(disk, after=after, kib_left=-(-shard.stat().st_size // 4096) * 4)
            with pytest.raises(OSError, match="could not be written to"):
                prune(dense, disk / "out", tiny_config(), on_layer=fill)
            torn += not (disk / "out" / "journal.jsonl").read_bytes().endswith(b"\n")
            (disk / "filler").unlink()
            assert prune(dense, disk / "out", tiny_config()).replayed_layers >= after
            assert model_files(disk / "out") == model_files(uninterrupted)
    assert torn


def test_a_disk_that_fills_at_the_end_gives_a_one_line_error_and_the_next_run_resumes(
    dense, uninterrupted, tiny_config, small_disk
):
    with small_disk("20M") as disk:
        with pytest.raises(OSError, match="could not be written to"):
            prune(dense, disk / "out", tiny_config(), on_layer=_fill(disk, after=4, kib_left=140))
        assert not (disk / "out" / "config.json").exists()
        (disk / "filler").unlink()
        assert prune(dense, disk / "out", tiny_config()).replayed_layers == 4
        assert model_files(disk / "out") == model_files(uninterrupted)


def _fill(disk, *, after, kib_left):
    """Leave so much room on the disk after a layer."""

    def on_layer(report, _):
        if report.layer == after - 1:
            with (disk / "filler").open("wb") as filler:
                os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(disk).free - (kib_left << 10))

    return on_layer
