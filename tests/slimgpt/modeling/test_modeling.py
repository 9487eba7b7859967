"""The checkpoint format: it loads with and without this package, and never as a dense model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from slimgpt.engine.pruner import prune
from slimgpt.modeling import per_layer, slim_llama
from slimgpt.modeling.slim_llama import SlimLlamaForCausalLM

PROMPTS = torch.tensor([[5, 80, 200, 31, 7], [300, 12, 9, 411, 66]])


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory, tiny_config):
    out = tmp_path_factory.mktemp("pruned") / "out"
    prune(dense, out, tiny_config(ratio=0.35))
    return out


def greedy(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.generate(PROMPTS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)


def test_layers_have_their_own_widths(pruned):
    model = AutoModelForCausalLM.from_pretrained(pruned)
    assert type(model) is SlimLlamaForCausalLM
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert len(set(widths)) > 1
    assert widths == [layer.intermediate_size for layer in model.config.per_layer_config]


def test_generation_is_the_same_with_and_without_cache(pruned):
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    ids = PROMPTS
    for _ in range(12):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(greedy(pruned), ids)


def test_saving_and_loading_keeps_every_logit(pruned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pruned)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(model(PROMPTS).logits, again(PROMPTS).logits)
    for module in (per_layer, slim_llama):  # and where this package is not installed: the code is beside the weights
        assert (tmp_path / "again" / Path(module.__file__).name).read_bytes() == Path(module.__file__).read_bytes()
    assert (
        again.config.auto_map == model.config.auto_map == json.loads((pruned / "config.json").read_text())["auto_map"]
    )


def test_left_padding_does_not_change_the_output(pruned):
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), PROMPTS], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(PROMPTS)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(logits, model(PROMPTS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_kernel_can_be_changed_after_loading(pruned, attention):
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    before = model(PROMPTS).logits
    model.set_attn_implementation(attention)
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {attention}
    torch.testing.assert_close(model(PROMPTS).logits, before, rtol=1e-4, atol=1e-4)


def test_it_cannot_be_taken_for_a_dense_llama(pruned):
    with pytest.raises(Exception, match="per-layer|mismatch|size"):
        LlamaForCausalLM.from_pretrained(pruned)
    as_llama = json.loads((pruned / "config.json").read_text())
    assert as_llama["model_type"] != "llama"


def test_the_checkpoint_contains_an_exact_copy_of_our_module(pruned):
    for module in (per_layer, slim_llama):
        source = Path(module.__file__)
        assert (pruned / source.name).read_bytes() == source.read_bytes()
    config = AutoConfig.from_pretrained(pruned)
    assert config.head_dim == 16  # not hidden_size / heads: written, never guessed


def test_lora_attaches_trains_and_merges(pruned, tmp_path):
    """PEFT on layers of different widths: the loss falls, and the merged model loads and equals the adapted one."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = adapted(PROMPTS, labels=PROMPTS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = adapted.eval()(PROMPTS).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(PROMPTS).logits, expected, rtol=1e-3, atol=1e-3)
