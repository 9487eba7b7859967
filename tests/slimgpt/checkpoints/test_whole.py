"""Weights that are not those of config.json: refused wherever a model is read, never made up or left out."""

import pytest
import torch

from slimgpt.checkpoints.loading import load_causal_lm
from slimgpt.config import RecoverConfig
from slimgpt.engine.plan import plan
from slimgpt.recovery.job import RecoveryJob
from tests.slimgpt.checkpoints.found_checkpoints import edit, refusal, store, tensors_of


@pytest.mark.parametrize("name", ["model.layers.3.mlp.gate_proj.weight", "model.norm.weight"])
def test_a_model_without_one_of_its_tensors_is_refused_everywhere(copy, tiny_config, name):
    """transformers makes up what is missing, at random, and goes on."""
    tensors = tensors_of(copy)
    del tensors[name]
    store(copy, tensors)
    refusal(copy, tiny_config, f"has no tensor {name}, which its config.json describes; download or make")
    for load in (lambda: load_causal_lm(copy, torch.float32), lambda: RecoveryJob(copy, RecoverConfig(tokens="2k"))):
        with pytest.raises(ValueError, match=f"has no tensor {name}, which its config.json describes"):
            load()


def test_a_config_that_describes_other_weights_is_refused(copy, tiny_config):
    edit(copy, {"num_hidden_layers": 5})
    refusal(copy, tiny_config, r"has no tensor model.layers.4\..*, which its config.json describes")
    edit(copy, {"num_hidden_layers": 4, "vocab_size": 500})
    refusal(copy, tiny_config, r"model.embed_tokens.weight is \[512, 64\] and not \[500, 64\]")


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({"num_hidden_layers": 3}, None),
        ({}, "model.layers.0.self_attn.q_proj.bias"),
        ({}, "model.layers.1.norm.weight"),
    ],
)
def test_a_layer_that_the_config_does_not_describe_is_not_left_out_in_silence(copy, tiny_config, changes, extra):
    edit(copy, changes)
    if extra:
        store(copy, {**tensors_of(copy), extra: torch.zeros(64)})
    name = extra or "model.layers.3.input_layernorm.weight"
    message = rf"holds {name} \({1 if extra else 9} such\), which its config.json does not describe"
    refusal(copy, tiny_config, message)
    for load in (lambda: load_causal_lm(copy, torch.float32), lambda: RecoveryJob(copy, RecoverConfig(tokens="2k"))):
        with pytest.raises(ValueError, match=message):
            load()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "swish2"}, "KeyError: 'swish2'"),
        ({"pad_token_id": 600}, "AssertionError: Padding_idx must be within num_embeddings"),
        ({"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}}, "KeyError: 'ntk'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": "2.0"}}, "TypeError: .*'str'"),
    ],
)
def test_a_config_of_which_no_model_can_be_built_is_named(copy, tiny_config, changes, reason):
    """transformers reads it, and fails later with whatever comes of it."""
    edit(copy, changes)
    message = rf"config.json is damaged: transformers cannot build the model .*\({reason}.*\); correct that value"
    refusal(copy, tiny_config, message)
    for load in (lambda: load_causal_lm(copy, torch.float32), lambda: RecoveryJob(copy, RecoverConfig(tokens="2k"))):
        with pytest.raises(ValueError, match=message):
            load()


def test_what_lies_beside_the_model_is_no_part_of_it(copy, tiny_config):
    """A value head of reinforcement learning, frequencies that old versions stored."""
    besides = {
        "v_head.summary.weight": torch.zeros(1, 64),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    store(copy, {**tensors_of(copy), **besides})
    plan(copy, tiny_config())
    load_causal_lm(copy, torch.float32)
