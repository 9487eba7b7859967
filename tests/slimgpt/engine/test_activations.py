"""Blocks are read as they were written, wherever they are stored; pruned models are bit-identical for every place."""

import os
import signal

import psutil
import pytest
import torch

from slimgpt.engine.activations import Blocks, DiskBlocks, choose_place, make_blocks
from slimgpt.engine.pruner import prune
from tests import processes

from .test_resume import model_files

CPU = torch.device("cpu")


@pytest.mark.parametrize("place", ["device", "disk"])
def test_blocks_replaced_during_reading_are_exact(tmp_path, place):
    """As the layer loop uses them: other widths and dtypes than before, the last block shorter."""
    first = [torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.randn(1, 5, 8)]
    blocks = make_blocks(place, 3, 3 * 5 * 8 * 4, CPU, tmp_path)
    for b, x in enumerate(first):
        blocks[b] = x
    seen = []
    for b, x in enumerate(blocks):
        seen.append(x)
        blocks[b] = x[..., 1:7].to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(seen, first, strict=True))
    again = list(blocks)
    assert [x.dtype for x in again] == [torch.bfloat16] * 3
    assert all(torch.equal(a, b[..., 1:7].to(torch.bfloat16)) for a, b in zip(again, first, strict=True))
    assert list(tmp_path.iterdir()) == []


def test_blocks_on_disk_take_no_memory(tmp_path):
    """512 MiB are written and read twice; the process grows only by a few blocks that malloc caches."""
    blocks, size = DiskBlocks(64, 8 << 20, CPU, tmp_path), 2 << 20
    before = psutil.Process().memory_info().rss
    for b in range(64):
        blocks[b] = torch.full((size,), float(b))
    highest = 0
    for _ in range(2):
        for b, x in enumerate(blocks):
            assert float(x[b]) == b
            highest = max(highest, psutil.Process().memory_info().rss)
    assert highest - before < 256 << 20


def test_a_killed_process_leaves_no_file(tmp_path):
    process = processes.start(_write_and_die, tmp_path)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []  # and a dead process holds none open


def _write_and_die(folder):
    blocks = DiskBlocks(16, 8 << 20, CPU, folder)
    for b in range(16):
        blocks[b] = torch.ones(2 << 20)
    os.kill(os.getpid(), signal.SIGKILL)


def test_on_a_cpu_device_and_host_are_the_same_place():
    assert [choose_place(place, CPU, 1 << 60) for place in ("auto", "device", "host", "disk")] == [
        "device",
        "device",
        "device",
        "disk",
    ]
    assert type(make_blocks("device", 1, 1, CPU, None)) is Blocks


@pytest.mark.parametrize("fields", [{}, {"keep_gib": 0, "num_samples": 7}, {"dtype": "bfloat16"}])
def test_activations_on_disk_give_a_bit_identical_model(dense, tmp_path, tiny_config, fields):
    reports = {
        place: prune(dense, tmp_path / place, tiny_config(**fields, activations=place)) for place in ("device", "disk")
    }
    assert {place: report.activations for place, report in reports.items()} == {"device": "device", "disk": "disk"}
    assert model_files(tmp_path / "device") == model_files(tmp_path / "disk")


def test_prices_made_from_activations_on_disk_are_the_same(dense, tmp_path, tiny_config, monkeypatch):
    for place in ("device", "disk"):
        monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / f"cache-{place}"))
        prune(dense, tmp_path / place, tiny_config(schedule="nats", activations=place))
    assert model_files(tmp_path / "device") == model_files(tmp_path / "disk")


def test_a_disk_without_room_for_activations_is_refused_and_another_place_resumes(
    dense, tmp_path, tiny_config, small_disk
):
    """18 MB hold the pruned model and the margin; the activations would take 6 more."""
    config = {"num_samples": 60, "seq_len": 256}
    with small_disk("18M") as disk:
        with pytest.raises(OSError, match=r"disk of .*out has .* GB free"):
            prune(dense, disk / "out", tiny_config(**config, activations="disk"))
        prune(dense, disk / "out", tiny_config(**config))
        prune(dense, tmp_path / "reference", tiny_config(**config))
        assert model_files(disk / "out") == model_files(tmp_path / "reference")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_on_a_gpu_host_and_disk_are_bit_identical_to_the_device(dense, tmp_path, tiny_config):
    for place in ("device", "host", "disk"):
        report = prune(dense, tmp_path / place, tiny_config(num_samples=64, activations=place, device="cuda"))
        assert report.activations == place
    assert model_files(tmp_path / "host") == model_files(tmp_path / "device")
    assert model_files(tmp_path / "disk") == model_files(tmp_path / "device")
