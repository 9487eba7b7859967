"""Counted work against loops over every multiplication, and the efficiency against its definition."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.bench.efficiency import Work, saving, work_of
from deploy.bench.results import Paired, Ratio
from deploy.serving.server import ServerError
from tests.deploy.slim_checkpoint import WIDTHS, write_dense, write_slim
from tests.tiny_models import VOCAB_SIZE

HIDDEN, HEAD_DIM = 128, 32


def by_loops(widths: list[tuple[int, int, int]], input_len: int, output_len: int, batch: int) -> Work:
    """One request after the other, one step after the other, one matrix after the other."""
    operations = read = 0
    matrices = []
    for heads, kv_heads, ffn in widths:
        matrices += [(heads * HEAD_DIM, HIDDEN), (HIDDEN, heads * HEAD_DIM)]  # q, o
        matrices += [(kv_heads * HEAD_DIM, HIDDEN)] * 2  # k, v
        matrices += [(ffn, HIDDEN)] * 2 + [(HIDDEN, ffn)]  # gate, up, down
    for step in range(output_len):
        new = list(range(input_len)) if step == 0 else [input_len + step - 1]
        read += sum(rows * columns for rows, columns in matrices) + VOCAB_SIZE * HIDDEN
        for _ in range(batch):
            for token in new:
                operations += sum(2 * rows * columns for rows, columns in matrices)
                for heads, _, _ in widths:
                    operations += 2 * 2 * heads * HEAD_DIM * (token + 1)  # scores, weighted values
            operations += 2 * VOCAB_SIZE * HIDDEN
            if step:
                read += sum(2 * kv_heads * HEAD_DIM for _, kv_heads, _ in widths) * (input_len + step)
    return Work(operations, 2 * read)


@pytest.mark.parametrize("batch", [1, 3])
def test_work_is_what_loops_count(tmp_path: Path, batch: int):
    lengths = {"input_len": 7, "output_len": 4, "batch": batch}
    assert work_of(write_slim(tmp_path / "slim"), **lengths) == by_loops(WIDTHS, *lengths.values())
    assert work_of(write_dense(tmp_path / "dense"), **lengths) == by_loops([(8, 4, 256)] * 4, *lengths.values())


def test_quantised_weights_count_as_they_are_stored(tmp_path: Path):
    """A byte of each, and a scale of two bytes for each row; embeddings, head, keys and values stay."""
    model = write_dense(tmp_path / "dense")
    lengths = {"input_len": 7, "output_len": 4, "batch": 3}
    before = work_of(model, **lengths)
    tensors, weights, rows = load_file(model / "model.safetensors"), 0, 0
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weights, rows = weights + tensors[name].numel(), rows + len(tensors[name])
        tensors[f"{name}_scale"] = torch.ones(len(tensors[name]), 1, dtype=torch.bfloat16)
        tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (model / "config.json").write_text(json.dumps(config))
    behind = work_of(model, **lengths)
    assert behind.operations == before.operations
    assert before.bytes - behind.bytes == lengths["output_len"] * (weights - 2 * rows)


def test_saving_everything_that_was_counted_is_an_efficiency_of_one():
    dense, pruned = Work(100, 100), Work(75, 80)
    found = saving(dense, pruned, [1 / 0.75])
    assert found is not None
    assert (found.operations, found.bytes) == (0.25, pytest.approx(0.2))
    assert found.efficiency == Ratio(*[pytest.approx(1)] * 3)


def test_efficiency_is_of_each_pair_and_of_the_larger_share():
    found = saving(Work(100, 100), Work(80, 50), [1.0, 4 / 3, 1 / 1.1])  # saved: 0, 25 %, -10 %
    assert found is not None
    assert found.time == Ratio(pytest.approx(0), pytest.approx(-0.1), pytest.approx(0.25))
    assert found.efficiency == Ratio(pytest.approx(0), pytest.approx(-0.2), pytest.approx(0.5))


def test_where_nothing_could_be_saved_there_is_no_efficiency():
    assert saving(Work(1, 1), Work(1, 1), [1.1]) is None


def test_a_dense_figure_of_zero_is_named_and_not_divided_by():
    """All tokens of an answer in one piece: no time between them."""
    with pytest.raises(ServerError, match=r"the dense model's mean_itl_ms is 0, .*output_len"):
        Paired.of([{"mean_itl_ms": 0.0}], [{"mean_itl_ms": 1.0}], ("mean_itl_ms",))
