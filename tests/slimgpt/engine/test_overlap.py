"""Reading and writing beside the computation, as on a GPU: the same bytes, files in order, nothing lost.

Here the computation is on the CPU, and the disk is slowed down.
"""

import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from slimgpt.engine import output_folder, overlap
from slimgpt.engine.journal import Journal
from slimgpt.engine.output_folder import OutputFolder
from slimgpt.engine.overlap import WriteBehind, read_ahead
from slimgpt.engine.pruner import prune
from tests import processes

from .test_resume import CrashError, crash_after, model_files

CPU = torch.device("cpu")


@pytest.fixture
def beside(monkeypatch, tmp_path):
    """Files are read and written beside the computation on the CPU too."""
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(overlap, "overlaps", lambda _: True)


def layers_in(journal):
    return [entry["part"] for entry in Journal(journal).read()[1:] if entry["part"].startswith("layer")]


@pytest.mark.parametrize("schedule", ["log", "nats"])
def test_the_bytes_are_those_of_one_thing_after_the_other(dense, tmp_path, tiny_config, monkeypatch, schedule):
    config = tiny_config(schedule=schedule)
    for name in ("alone", "beside"):
        monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / f"cache of {name}"))
        monkeypatch.setattr(overlap, "overlaps", lambda _, beside=name == "beside": beside)
        prune(dense, tmp_path / name, config)
    assert model_files(tmp_path / "alone") == model_files(tmp_path / "beside")
    assert layers_in(tmp_path / "beside") == [f"layer {i}" for i in range(4)]


@pytest.mark.usefixtures("beside")
def test_layers_are_computed_while_a_slow_disk_writes_and_files_keep_their_order(
    dense, tmp_path, tiny_config, monkeypatch
):
    """Each layer's file waits until the program has gone on, so that it would wait for ever in its place."""
    events, finish = [], OutputFolder.finish_layer
    gone_on = [threading.Event() for _ in range(4)]

    def slowly(folder, i, tensors, report):
        events.append(("begun", i))
        assert gone_on[i].wait(60)
        finish(folder, i, tensors, report)
        events.append(("written", i))

    def decided(report, _):
        events.append(("decided", report.layer))
        gone_on[report.layer].set()

    monkeypatch.setattr(OutputFolder, "finish_layer", slowly)
    prune(dense, tmp_path / "out", tiny_config(), on_layer=decided)
    of = {name: [i for event, i in events if event == name] for name in ("begun", "written", "decided")}
    assert all(layers == [0, 1, 2, 3] for layers in of.values())
    at = {event: place for place, event in enumerate(events)}
    for i in range(3):
        assert at["decided", i] < at["written", i] < at["begun", i + 1]  # the next begins when the last has ended


@pytest.mark.usefixtures("beside")
def test_a_layer_that_could_not_be_written_ends_the_run_and_the_next_run_makes_it_again(
    dense, tmp_path, tiny_config, monkeypatch
):
    write = output_folder.write_shard

    def full(path, tensors):
        if "00002" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    config = tiny_config()
    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "write_shard", full)
        with pytest.raises(OSError, match="could not be written"):
            prune(dense, tmp_path / "out", config)
    assert layers_in(tmp_path / "out") == []  # shard 2 is layer 0: none stands behind a gap
    prune(dense, tmp_path / "reference", config)
    prune(dense, tmp_path / "out", config)
    assert model_files(tmp_path / "out") == model_files(tmp_path / "reference")


@pytest.mark.usefixtures("beside")
def test_what_is_being_written_when_a_run_ends_is_written_to_the_end(dense, tmp_path, tiny_config):
    config = tiny_config()
    with pytest.raises(CrashError):
        prune(dense, tmp_path / "out", config, on_layer=crash_after(2))
    assert prune(dense, tmp_path / "out", config).replayed_layers == 2


def prune_on_a_disk_that_stops(dense, out, config, at, reached) -> None:
    """A run whose disk hangs for ever before it names the shard of layer ``at``."""
    overlap.overlaps = lambda _: True
    commit = output_folder.write_shard

    def write(path, tensors):
        if path.name.startswith(f"model-{at + 2:05d}"):
            reached.put(threading.current_thread().name)
            time.sleep(600)
        return commit(path, tensors)

    output_folder.write_shard = write
    prune(dense, out, config)


def test_kill_9_between_a_layers_decision_and_its_file_loses_that_layer_alone(dense, tmp_path, tiny_config):
    config, out = tiny_config(), tmp_path / "out"
    reached = processes.queue()
    process = processes.start(prune_on_a_disk_that_stops, dense, out, config, 2, reached)
    assert reached.get(timeout=120).startswith("write")
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    prune(dense, tmp_path / "reference", config)
    assert prune(dense, out, config).replayed_layers == 2
    assert model_files(out) == model_files(tmp_path / "reference")


@pytest.mark.usefixtures("beside")
def test_one_layer_is_read_ahead_and_an_error_comes_when_it_is_that_layers_turn():
    read = []

    def fetch(i):
        read.append(i)
        if i == 3:
            raise OSError("damaged")
        return i

    coming = read_ahead(fetch, range(9), CPU)
    assert next(coming) == 0
    deadline = time.monotonic() + 60
    while len(read) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read == [0, 1]
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(OSError, match="damaged"):
        next(coming)
    assert max(read) <= 4


@pytest.mark.usefixtures("beside")
def test_the_first_error_is_the_one_that_is_told():
    def fail():
        raise OSError("the disk")

    def both():
        with WriteBehind(CPU) as behind:
            behind(fail)
            raise ValueError("the program")

    with pytest.raises(ValueError, match="the program"):
        both()
    with pytest.raises(OSError, match="the disk"), WriteBehind(CPU) as behind:
        behind(fail)


def test_on_a_cpu_each_comes_in_its_turn():
    read = []
    coming = read_ahead(read.append, range(9), CPU)
    next(coming)
    assert read == [0]
    with WriteBehind(CPU) as behind:
        behind(lambda: read.append("written"))
        assert read == [0, "written"]


def test_activations_that_are_computed_again_change_no_bit_also_on_resume(dense, tmp_path, tiny_config):
    config = tiny_config(keep_gib=0)
    kept = prune(dense, tmp_path / "kept", tiny_config())
    with pytest.raises(CrashError):
        prune(dense, tmp_path / "again", config, on_layer=crash_after(2))
    again = prune(dense, tmp_path / "again", replace(config, keep_gib=-1))
    assert (kept.layers_kept, again.replayed_layers) == (4, 2)
    assert prune(dense, tmp_path / "never", config).layers_kept == 0
    files = model_files(tmp_path / "kept")
    assert files == model_files(tmp_path / "again") == model_files(tmp_path / "never")
