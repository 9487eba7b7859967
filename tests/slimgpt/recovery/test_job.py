"""What a training takes, known before it: widths, defaults that go with the tokens."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimgpt.checkpoints.families import layer_shapes
from slimgpt.checkpoints.origins import read_config
from slimgpt.config import RecoverConfig
from slimgpt.engine.pruner import prune
from slimgpt.recovery.cost import memory_bytes
from slimgpt.recovery.job import RecoveryJob
from tests.tiny_families import write_family
from tests.tiny_models import write_dense


@pytest.mark.parametrize("trainable", ["lora", "all"])
@pytest.mark.parametrize("family", ["vicuna", "phi3"])
def test_what_is_planned_before_the_pruning_is_what_is_planned_behind_it(family, trainable, tiny_config, tmp_path):
    dense, pruned = write_family(tmp_path / "dense", family), tmp_path / "pruned"
    prune(dense, pruned, tiny_config(ratio=0.5))
    config = RecoverConfig(tokens="1024", seq_len=32, trainable=trainable, dtype="float32")
    before = RecoveryJob(dense, config, dense, layer_shapes(read_config(pruned)))
    behind = RecoveryJob(pruned, config, dense)
    assert (before.parameters, before.trained) == (behind.parameters, behind.trained)
    assert memory_bytes(before) == pytest.approx(memory_bytes(behind), rel=1e-4)  # the files' headers
    assert before.disk_bytes == pytest.approx(behind.disk_bytes, rel=1e-3)
    assert before.trained < RecoveryJob(dense, config, dense, layer_shapes(read_config(dense))).trained


def test_the_weights_to_come_are_known_where_embeddings_are_stored_in_another_dtype(tiny_config, tmp_path):
    dense, pruned = write_dense(tmp_path / "dense", dtype=torch.bfloat16), tmp_path / "pruned"
    tensors = load_file(dense / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    prune(dense, pruned, tiny_config(ratio=0.5))
    config = RecoverConfig(tokens="1024", seq_len=32, dtype="float32")
    before = RecoveryJob(dense, config, dense, layer_shapes(read_config(pruned)))
    assert before.weight_bytes == pytest.approx(RecoveryJob(pruned, config, dense).weight_bytes, rel=0.01)


def test_several_processes_have_a_sequence_each_by_default():
    assert [RecoverConfig().filled(n).batch_size % n for n in (1, 2, 3, 8)] == [0] * 4
    assert RecoverConfig(batch_size=6).filled(4).batch_size == 6  # refused where it cannot be shared


@pytest.mark.parametrize(
    ("tokens", "processes", "seq_len", "held_out"),
    [
        ("1024", 1, 256, 32),
        ("131072", 1, 256, 32),
        ("262143", 1, 256, 32),
        ("262144", 1, 512, 16),
        ("524288", 1, 1024, 8),
        ("2M", 1, 1024, 8),
        ("2M", 4, 512, 16),
    ],
)
def test_few_tokens_are_read_in_short_sequences(tokens, processes, seq_len, held_out):
    """The longest that leave 512 steps; as many tokens are held out, whatever their length."""
    filled = RecoverConfig(tokens=tokens).filled(processes)
    assert (filled.seq_len, filled.held_out) == (seq_len, held_out)
    own = RecoverConfig(tokens=tokens, seq_len=2048, held_out=3).filled(processes)
    assert (own.seq_len, own.held_out) == (2048, 3)
    assert RecoverConfig(tokens=tokens, seq_len=2048).filled(processes).held_out == 4


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({"trainable": "all", "tokens": "2M"}, 3e-4),
        ({"trainable": "all", "tokens": "131072"}, 1.5e-4),
        ({"trainable": "all", "tokens": "2M", "batch_size": 4, "seq_len": 1024}, 6e-4),
        ({"tokens": "2M"}, 2.5e-3),
        ({"tokens": "131072"}, 1.25e-3),
        ({"tokens": "131072", "learning_rate": 0.01}, 0.01),
        ({"method": "lora", "tokens": "131072"}, 1e-4),  # the paper's, whatever a step reads
    ],
)
def test_the_learning_rate_goes_with_the_root_of_a_steps_tokens(given, rate):
    assert RecoverConfig(**given).filled().learning_rate == pytest.approx(rate)
