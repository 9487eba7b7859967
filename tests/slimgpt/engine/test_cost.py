"""The operations that cost.py counts equal torch's own count."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from slimgpt.checkpoints.families import layer_shapes
from slimgpt.engine.cost import Setting, estimate
from slimgpt.method import obs

SETTING = Setting(samples=3, seq_len=16, block_tokens=32, item=4, stored=2, keep=2**30, cpu=True)


def cost_of(dense, pruned, setting):
    return estimate(dense, pruned, setting, embedding=1000, parameters=10_000)


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
