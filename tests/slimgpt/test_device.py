"""What dtype a setting means: on this machine's CPU, on one with units for bfloat16, and on a GPU."""

import json

import pytest
import torch

from slimgpt.config import EvalConfig
from slimgpt.device import compute_dtype, dtype_name, has_fast_bfloat16, resolve_device
from slimgpt.engine.job import Job
from slimgpt.engine.pruner import prune
from slimgpt.evaluation.harness import evaluate
from tests.tiny_models import write_dense

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "units", "stored", "expected"),
    [
        ("cpu", True, torch.bfloat16, torch.bfloat16),
        ("cpu", True, torch.float16, torch.bfloat16),
        ("cpu", True, torch.float32, torch.float32),  # what was stored in full is computed in full
        ("cpu", True, None, torch.float32),
        ("cpu", False, torch.bfloat16, torch.float32),
        ("cpu", False, torch.float16, torch.float32),
        ("cuda", False, torch.float16, torch.float16),
        ("cuda", False, torch.bfloat16, torch.bfloat16),
        ("cuda", False, torch.float32, torch.float32),
    ],
)
def test_auto(device, units, stored, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: units)  # this machine is of one kind
    assert compute_dtype("auto", torch.device(device), stored) == expected
    for name in ("float32", "bfloat16", "float16"):
        assert compute_dtype(name, torch.device(device), stored) == getattr(torch, name)


@pytest.mark.parametrize("name", ["meta", "mps", "xpu"])
def test_a_device_that_nothing_here_computes_on_is_refused_in_one_short_line(name):
    """torch makes a tensor on some of them, or refuses with the list of all that it knows."""
    with pytest.raises(ValueError, match=f"device '{name}' is not usable here .*CPUs and.*; use cpu, cuda or auto$"):
        resolve_device(name)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_pruning_and_evaluation_record_what_auto_was(tmp_path, tiny_config, stored):
    """On whatever kind of CPU runs this."""
    dense = write_dense(tmp_path / "dense", dtype=stored)
    used = dtype_name(torch.bfloat16 if stored == torch.bfloat16 and has_fast_bfloat16(CPU) else torch.float32)
    report = prune(dense, tmp_path / "out", tiny_config(device="cpu"))
    assert report.config["dtype"] == used
    assert dtype_name(Job(dense, tiny_config(device="cpu")).dtype) == used
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["steps"][0]["config"]["dtype"] == used
    config = EvalConfig(tasks=(), perplexity="python", seq_len=64, max_blocks=1, device="cpu")
    measured = evaluate(tmp_path / "out", config)
    assert (measured.dtype, measured.config["dtype"]) == (used, used)
