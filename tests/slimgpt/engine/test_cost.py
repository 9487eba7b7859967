"""The operations that cost.py counts equal torch's own count, and the memory is what is measured."""

import ctypes
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from slimgpt import PruneConfig, plan, prune
from slimgpt.checkpoints.families import layer_shapes
from slimgpt.data.calibration import Calibration
from slimgpt.engine import activations, cost, job
from slimgpt.engine.cost import IMPORTS, Setting, estimate, price_samples
from slimgpt.method import obs
from slimgpt.usage import peak_memory
from tests import processes
from tests.tiny_models import write_dense

M_MMAP_THRESHOLD = -3  # of malloc.h
SETTING = Setting(samples=3, seq_len=16, block_tokens=32, item=4, stored=2, keep=2**30, cpu=True)


def cost_of(dense, pruned, setting):
    return estimate(dense, pruned, setting, embedding=1000, embedding_bytes=2000, weight_bytes=20_000)


def test_forward_pass_operations_equal_torchs_count(dense):
    model = AutoModel.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")  # sdpa is not counted
    shapes = layer_shapes(model.config)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.zeros(3, 16, dtype=torch.long), use_cache=False)
    # eager attention computes the full square
    other_half = sum(2 * 48 * 16 * shape.num_heads * shape.head_dim for shape in shapes)
    assert cost_of(shapes, shapes, SETTING).forward == counter.get_total_flops() - other_half


@pytest.mark.parametrize("dim", [128, 384, 1536])
def test_gram_product_operations_equal_torchs_count(dense, dim):
    [shape, *_] = layer_shapes(AutoModel.from_pretrained(dense).config)
    shape = replace(shape, num_heads=dim // 64, num_kv_heads=dim // 64, head_dim=64, intermediate_size=dim)

    def product(_out, a, b, **_):
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        for _ in ("attention", "ffn"):
            obs.Gram(dim, "cpu").add(torch.zeros(48, dim))
    assert cost_of([shape], [shape], SETTING).gram == counter.get_total_flops()


def test_processes_share_tokens_and_a_file_takes_activations_out_of_memory(dense):
    shapes = layer_shapes(AutoModel.from_pretrained(dense).config)
    many = replace(SETTING, samples=64, seq_len=512)
    alone, shared = (cost_of(shapes, shapes, replace(many, processes=n)) for n in (1, 8))
    assert (shared.forward, shared.gram) == (alone.forward / 8, alone.gram / 8)
    assert shared.solve == alone.solve
    on_disk = cost_of(shapes, shapes, replace(many, place="disk"))
    waiting = 64 * 512 * (shapes[0].hidden_size + shapes[0].num_heads * shapes[0].head_dim) * 4
    assert on_disk.disk - alone.disk == waiting
    assert alone.host - on_disk.host == waiting - 3 * waiting // 64  # three of 64 blocks are on their way


@pytest.mark.parametrize(
    ("widest", "samples", "seq_len", "processes", "expected"),
    [
        (1536, 32, 1024, 1, 17),  # SmolLM2: 11 x 1536 = 16,896 tokens, in whole sequences
        (1536, 8, 1024, 1, 8),  # all there are
        (11008, 256, 2048, 1, 32),  # 65,536, the most
        (64, 32, 1024, 4, 4),  # one of each process
    ],
)
def test_sequences_that_prices_are_taken_from(widest, samples, seq_len, processes, expected):
    assert price_samples(widest, samples, seq_len, processes) == expected


def memory_of_pruning(model: Path, out: Path, fields: dict, answer) -> None:
    """Answer planned and measured peak memory, both beyond what a process has before it begins."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 18)  # else glibc keeps up to 100 MB of freed pieces for later
    cost.PRICE_TOKENS_PER_CHANNEL = 128  # so narrow an FFN needs few, whose hidden states would take no memory
    config = PruneConfig(calibration="python", device="cpu", seq_len=256, block_tokens=2048, keep_gib=0.0, **fields)
    ids_NT = torch.randint(0, 500, (config.num_samples, 256), generator=torch.Generator().manual_seed(0))
    tokens = Calibration(ids_NT, {"name": "random", "ids_sha256": "0"})
    planned = plan(model, config, calibration=tokens, estimate_seconds=False).memory_bytes - IMPORTS
    before = peak_memory(torch.device("cpu"))
    answer.put((planned, prune(model, out, config, calibration=tokens).peak_memory_bytes - before))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what malloc keeps for later can be set in glibc alone")
@pytest.mark.parametrize(
    ("width", "samples", "place", "schedule", "floor"),
    [
        (256, 256, "device", "log", 2**27 * 2),  # hidden states, and as much of head outputs
        (256, 256, "disk", "log", 0),
        (3072, 32, "device", "log", 2 * 8 * 3072**2),  # H and its inverse
        (256, 128, "device", "nats", 2**26 * 3),  # every layer's input
        pytest.param(3072, 32, "device", "nats", 3 * 8 * 3072**2, marks=pytest.mark.all),  # and all of the elimination
    ],
)
def test_measured_memory_is_what_was_planned(tmp_path, width, samples, place, schedule, floor, monkeypatch):
    """On disk it holds from the embedding on: all hidden states are 134 MB."""
    dense = write_dense(tmp_path / "dense", num_hidden_layers=2, hidden_size=512, head_dim=64, intermediate_size=width)
    answer = processes.queue()
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / "cache"))
    fields = {"num_samples": samples, "activations": place, "schedule": schedule, "ffn_multiple": 16}
    processes.start(memory_of_pruning, dense, tmp_path / "out", fields, answer).join()
    planned, measured = answer.get(timeout=10)
    assert planned > floor
    assert measured == pytest.approx(planned, abs=80 << 20)  # code and tables that are touched for the first time


def test_the_tables_in_the_docs_are_up_to_date():
    root = Path(__file__).parents[3]
    command = [sys.executable, "benchmarks/scaling.py", "--tables"]
    printed = subprocess.run(
        command, cwd=root, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    rows = printed.stdout.strip().split("\n\n")
    assert len(rows) == 2
    for table in rows:
        assert table in (root / "docs" / "scale.md").read_text()


@pytest.mark.parametrize("samples", [64, 4096])
@pytest.mark.parametrize("free_gib", [0.01, 0.1, 1.0, 10.0])
def test_a_run_on_a_gpu_keeps_activations_where_it_leaves_room_and_never_plans_with_more(
    dense, monkeypatch, samples, free_gib
):
    """The arithmetic alone: here is no GPU whose free memory could be asked for."""
    free = int(free_gib * 2**30)
    for module in (activations, job):
        monkeypatch.setattr(module, "free_memory", lambda _: free)
    planned = job.Job(dense, PruneConfig(device="cpu", num_samples=samples, seq_len=256, ffn_multiple=4))
    planned.device = torch.device("cuda")
    place = planned.place()
    kept = all(map(planned.setting(place).keeps, planned.shapes))
    without = replace(planned.setting(place), keep=0)
    channels = samples * 256 * planned.shapes[0].intermediate_size * planned.dtype.itemsize
    least = planned._cost(without).device
    assert kept == (channels <= max(0, int(0.9 * free) - least))
    assert planned.cost(place).device <= max(least, 0.9 * free)
    alone = planned._cost(replace(without, place="device")).device
    assert place == ("device" if alone <= free else "host")
