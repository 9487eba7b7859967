"""Two processes on CPU (gloo): the same model as from one process, and if one ends, both end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from slimgpt.engine.pruner import prune
from slimgpt.engine.ranks import Ranks
from slimgpt.report import load_report
from tests import processes

from .test_resume import model_files

ROOT = Path(__file__).parents[3]


def _in_group(store, rank, function, arguments, results):
    """``function(rank, *arguments)`` as one process of a group; puts its result, or the error that ended it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        result = function(rank, *arguments)
    except BaseException as error:  # an interrupt, too, must end both
        result = f"{type(error).__name__}: {error}"
    results.put((rank, result))


def in_two_processes(tmp_path, function, *arguments):
    """The results of both, None for one that was killed. A process that hangs fails the test."""
    store = tmp_path / f"store{len(list(tmp_path.glob('store*')))}"
    results = processes.queue()
    both = [processes.start(_in_group, store, rank, function, arguments, results) for rank in (0, 1)]
    for process in both:
        process.join(300)
    hung = [process for process in both if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung
    given = dict(results.get(timeout=10) for process in both if process.exitcode == 0)
    return [given.get(rank) for rank in (0, 1)]


def _prune(rank, dense, out, config, on_layer=None):
    report = prune(dense, out, config, on_layer=on_layer)
    return report.ranks, report.replayed_layers


def torchrun(*arguments):
    """On CPUs: NCCL refuses two processes on one GPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "slimgpt"]
    command += [*map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_torchrun_gives_the_pruning_of_one_process(dense, tmp_path, tiny_config, text_file):
    """Nine sequences for two processes: one has one block more than the other."""
    config = tiny_config(num_samples=9, device="cpu")
    one = prune(dense, tmp_path / "one", config)
    small = ["--ratio", 0.3, "--ffn-multiple", 4, "--num-samples", 9, "--seq-len", 64, "--block-tokens", 128]
    done = torchrun("prune", dense, tmp_path / "two", *small, "--schedule", "log", "--calibration", text_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == done.stderr.count("prune:   0%") == 1
    two = load_report(tmp_path / "two")
    assert (one.ranks, two.ranks) == (1, 2)
    assert two.calibration == one.calibration
    for a, b in zip(one.layers, two.layers, strict=True):
        assert (a.kept_heads, a.kept_kv_heads, a.kept_channels) == (b.kept_heads, b.kept_kv_heads, b.kept_channels)
        assert b.ffn_error == pytest.approx(a.ffn_error, rel=1e-4)
    assert any(layer.num_attention_heads < 8 for layer in two.layers)
    for path in (tmp_path / "one").glob("*.safetensors"):
        other = load_file(tmp_path / "two" / path.name)
        for name, tensor in load_file(path).items():
            assert float((other[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name


def test_torchrun_reports_an_error_once(dense, tmp_path, text_file):
    flags = ("--num-samples", 1, "--seq-len", 64, "--ffn-multiple", 4, "--calibration", text_file)
    done = torchrun("prune", dense, tmp_path / "out", *flags)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: 1 calibration sequences cannot be split among 2 processes; ask for at least 2")
    assert done.returncode != 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fields", [{}, {"keep_gib": 0, "activations": "disk"}])
def test_two_processes_give_bit_identical_results_each_time(dense, tmp_path, tiny_config, fields):
    for name in ("a", "b"):
        assert in_two_processes(tmp_path, _prune, dense, tmp_path / name, tiny_config(**fields)) == [(2, 0)] * 2
    assert model_files(tmp_path / "a") == model_files(tmp_path / "b")


def _kill_the_second_after_two_layers(rank, dense, out, config):
    def on_layer(report, _):
        if rank == 1 and report.layer == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return _prune(rank, dense, out, config, on_layer)


def test_killing_one_process_ends_both_and_the_next_run_resumes(dense, tmp_path, tiny_config):
    config, out = tiny_config(), tmp_path / "out"
    first, second = in_two_processes(tmp_path, _kill_the_second_after_two_layers, dense, out, config)
    assert second is None
    assert first.startswith("ConnectionError: rank 0 of 2 lost the others (")
    assert first.endswith("finished layers are kept: run the same command again to resume")
    assert in_two_processes(tmp_path, _prune, dense, out, config) == [(2, 2), (2, 2)]
    in_two_processes(tmp_path, _prune, dense, tmp_path / "complete", config)
    assert model_files(out) == model_files(tmp_path / "complete")


def _fail_on_one(rank, dense, out, config, failing, error):
    def on_layer(report, _):
        if rank == failing and report.layer == 1:
            raise error

    return _prune(rank, dense, out, config, on_layer)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [ValueError("layer 1 is broken"), KeyboardInterrupt("stopped")])
def test_an_error_in_one_process_ends_both_with_it(dense, tmp_path, tiny_config, failing, error):
    errors = in_two_processes(tmp_path, _fail_on_one, dense, tmp_path / "out", tiny_config(), failing, error)
    assert errors == [f"{type(error).__name__}: {error}"] * 2


class TwoPartError(Exception):
    """Cannot be sent: its constructor takes other arguments than it passes to Exception."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


def test_an_error_that_cannot_be_sent_ends_both_with_its_text(dense, tmp_path, tiny_config):
    error = "TwoPartError: broken at layer 1"
    errors = in_two_processes(tmp_path, _fail_unsendably, dense, tmp_path / "out", tiny_config())
    assert errors == [f"RuntimeError: {error}", error]


def _fail_unsendably(rank, dense, out, config):
    def on_layer(report, _):
        if rank == 1:
            raise TwoPartError("broken", "layer 1")

    return _prune(rank, dense, out, config, on_layer)


def test_a_refusal_by_the_first_process_is_raised_in_both(dense, tmp_path, tiny_config):
    """Only the first reads OUT."""
    prune(dense, tmp_path / "out", tiny_config())
    before = model_files(tmp_path / "out")
    first, second = in_two_processes(tmp_path, _prune, dense, tmp_path / "out", tiny_config())
    assert first == second
    assert "FileExistsError" in first
    assert "processes was 1, now 2" in first
    assert model_files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("ratio", "where"), [(0.3, "layer 0, mlp.down_proj: the activations hold NaN"), (0, "layer 0 gives NaN")]
)
def test_nan_in_one_process_ends_both_with_the_layers_name(dense, tmp_path, tiny_config, ratio, where):
    """In the first layer only the FFN's map has statistics (its heads are kept); without pruning none has."""
    config = tiny_config(ratio=ratio)
    first, second = in_two_processes(tmp_path, _prune_with_nan_on_the_second, dense, tmp_path / "out", config)
    assert first == second
    assert first.startswith(f"ValueError: {where}")


def _prune_with_nan_on_the_second(rank, dense, out, config):
    from slimgpt.engine.layer_pass import Frame

    embed = Frame.embed

    def broken(self, ids_NT, block):
        for x_BTD in embed(self, ids_NT, block):
            yield x_BTD * float("nan") if rank == 1 else x_BTD

    Frame.embed = broken
    return _prune(rank, dense, out, config)


def test_shares_cover_every_sequence_once():
    ranks, ids_NT = Ranks(), torch.arange(22).view(11, 2)
    ranks.count = 4
    shares = []
    for ranks.index in range(4):
        shares.append(ranks.share(ids_NT))
    assert torch.equal(torch.cat(shares), ids_NT)
    assert sorted(map(len, shares)) == [2, 3, 3, 3]
