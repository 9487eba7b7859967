"""The layer loop end to end on tiny models, against plain least squares: results and refusals."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from slimgpt.data.calibration import calibrate
from slimgpt.engine.pruner import prune
from slimgpt.method.shapes import HeadLayout
from slimgpt.report import load_report
from tests.tiny_models import write_dense

from .test_resume import model_files


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def inputs_of(model, module, ids_NT):
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        model(ids_NT)
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize("unit", ["auto", "kv_group", "query"])
def test_every_weight_is_the_least_squares_optimum_for_the_outputs_of_the_pruned_layers_before_it(
    dense, tmp_path, tiny_config, unit
):
    """The oracle is a plain transformers model whose blocks are replaced one by one: no code of the loop."""
    config = tiny_config(head_unit=unit, head_budget="ratio", ratio=0.4, first_ratio_share=0.8)
    report = prune(dense, tmp_path / "out", config)
    ids_NT = calibrate(dense, config.calibration, num_samples=8, seq_len=64, seed=0).ids_NT
    hybrid, pruned = load(dense), load(tmp_path / "out")
    cut_heads = 0
    for layer, target, facts in zip(hybrid.model.layers, pruned.model.layers, report.layers, strict=True):
        columns = HeadLayout(8, 4, 16, 64).columns(facts.kept_heads)
        check_refit(hybrid, layer.self_attn.o_proj, target.self_attn.o_proj, columns, ids_NT, facts.attention_error)
        kv_rows = HeadLayout(8, 4, 16, 64).columns(facts.kept_kv_heads)
        assert torch.equal(target.self_attn.q_proj.weight, layer.self_attn.q_proj.weight[columns])
        assert torch.equal(target.self_attn.v_proj.weight, layer.self_attn.v_proj.weight[kv_rows])
        layer.self_attn = deepcopy(target.self_attn)
        channels = torch.tensor(facts.kept_channels)
        check_refit(hybrid, layer.mlp.down_proj, target.mlp.down_proj, channels, ids_NT, facts.ffn_error)
        assert torch.equal(target.mlp.gate_proj.weight, layer.mlp.gate_proj.weight[channels])
        layer.mlp = deepcopy(target.mlp)
        cut_heads += 8 - facts.num_attention_heads
    assert cut_heads > 0
    with torch.inference_mode():
        assert torch.equal(hybrid(ids_NT).logits, pruned(ids_NT).logits)


def check_refit(model, dense_map, pruned_map, kept_K, ids_NT, error):
    x_TD = inputs_of(model, dense_map, ids_NT)
    W_OD, H_DD = dense_map.weight.detach().double(), x_TD.T @ x_TD
    damped_DD = H_DD + 0.01 * H_DD.diagonal().mean() * torch.eye(len(H_DD), dtype=H_DD.dtype)
    if len(kept_K) == W_OD.shape[1]:
        assert torch.equal(pruned_map.weight, dense_map.weight)
        return
    expected = torch.linalg.solve(damped_DD[kept_K][:, kept_K], (W_OD @ damped_DD[:, kept_K]).T).T
    got = pruned_map.weight.detach().double()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    outputs_TO = x_TD @ W_OD.T
    lost = (outputs_TO - x_TD[:, kept_K] @ got.T).square().sum() / outputs_TO.square().sum()
    assert error == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("name", ["dense", "dense_mha"])
def test_ratio_counts_and_report_agree_with_the_reloaded_model(name, request, tmp_path, tiny_config):
    source = request.getfixturevalue(name)
    report = prune(source, tmp_path / "out", tiny_config())
    model = load(tmp_path / "out")
    assert report.ratio == pytest.approx(0.3, abs=0.005)
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after
    assert sum(p.numel() for p in load(source).parameters()) == report.parameters_before
    for layer, facts in zip(model.model.layers, report.layers, strict=True):
        assert layer.mlp.down_proj.in_features == facts.intermediate_size == len(facts.kept_channels)
        assert layer.self_attn.q_proj.out_features == facts.num_attention_heads * layer.self_attn.head_dim
        assert facts.num_attention_heads % facts.num_key_value_heads == 0
    assert load_report(tmp_path / "out") == report
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr() or name == "dense_mha"


def test_companion_files_are_copied_byte_for_byte(dense, tmp_path, tiny_config):
    prune(dense, tmp_path / "out", tiny_config())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes()


def test_ratio_zero_changes_no_weight(dense, tmp_path, tiny_config):
    prune(dense, tmp_path / "out", tiny_config(ratio=0))
    before, after = load(dense).state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_the_stored_dtype_is_kept(tmp_path, tiny_config):
    source = write_dense(tmp_path / "bf16", dtype=torch.bfloat16)
    prune(source, tmp_path / "out", tiny_config())
    assert load_file(next((tmp_path / "out").glob("model-00002*")))["model.layers.0.mlp.down_proj.weight"].dtype == (
        torch.bfloat16
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_pruned_model_can_be_pruned_again(dense, tmp_path, tiny_config):
    first = prune(dense, tmp_path / "a", tiny_config())
    second = prune(tmp_path / "a", tmp_path / "b", tiny_config(ratio=0.2))
    assert second.parameters_before == first.parameters_after
    assert second.ratio == pytest.approx(0.2, abs=0.005)
    assert sum(p.numel() for p in load(tmp_path / "b").parameters()) == second.parameters_after


def test_equal_layers_give_a_stock_checkpoint(dense_mha, tmp_path, tiny_config):
    config = tiny_config(schedule="uniform", ratio=0.5, ffn_multiple=64, head_budget="ratio")
    prune(dense_mha, tmp_path / "out", config)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "llama"
    assert model.config.num_attention_heads == 4
    assert not list((tmp_path / "out").glob("*.py"))


def test_equal_layers_that_llama_config_refuses_are_written_per_layer(dense_mha, tmp_path, tiny_config):
    """64 is not a multiple of 6 heads: LlamaConfig would refuse to load it even though head_dim is given."""
    config = tiny_config(schedule="uniform", ratio=0.25, ffn_multiple=32, head_budget="ratio")
    prune(dense_mha, tmp_path / "out", config)
    config = load(tmp_path / "out").config
    assert config.model_type == "slim_llama"
    assert {layer.num_attention_heads for layer in config.per_layer_config} == {6}


def test_a_falling_schedule_takes_most_from_the_first_layer_and_the_diagonal_score_chooses_there(
    dense_mha, tmp_path, tiny_config
):
    """Layer 0 sees the same tokens as in the dense model: its heads go by their columns' errors, anew each time."""
    config = tiny_config(schedule="linear_decreasing", head_error="diagonal", head_budget="ratio")
    report = prune(dense_mha, tmp_path / "out", config)
    assert report.ratio == pytest.approx(0.3, abs=0.005)
    widths = [layer.intermediate_size for layer in report.layers]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    model, layout = load(dense_mha), HeadLayout(8, 8, 8, 64)
    ids_NT = calibrate(dense_mha, config.calibration, num_samples=8, seq_len=64, seed=0).ids_NT
    o_proj = model.model.layers[0].self_attn.o_proj
    x_TD = inputs_of(model, o_proj, ids_NT)
    W_OD, H_DD = o_proj.weight.detach().double(), x_TD.T @ x_TD
    H_DD += 0.01 * H_DD.diagonal().mean() * torch.eye(len(H_DD), dtype=H_DD.dtype)
    left = list(range(8))
    while len(left) > report.layers[0].num_attention_heads:
        kept_K = layout.columns(left)
        inverse_KK = torch.linalg.inv(H_DD[kept_K][:, kept_K])
        errors = (W_OD @ H_DD[:, kept_K] @ inverse_KK).square().sum(dim=0) / inverse_KK.diagonal()
        left.pop(int(errors.view(-1, 8).sum(dim=1).argmin()))
    assert report.layers[0].kept_heads == left
    assert len(left) < 8


def test_block_size_changes_nothing_but_rounding(dense, tmp_path, tiny_config):
    """Two sequences at once or all eight: a layer's output must not be cut to its first sequence."""
    small = prune(dense, tmp_path / "small", tiny_config(block_tokens=64))
    large = prune(dense, tmp_path / "large", tiny_config(block_tokens=3 * 64))
    assert [x.kept_heads for x in small.layers] == [x.kept_heads for x in large.layers]
    for a, b in zip(small.layers, large.layers, strict=True):
        assert a.ffn_error == pytest.approx(b.ffn_error, rel=1e-3)


def test_the_same_run_twice_is_bit_identical(dense, tmp_path, tiny_config):
    prune(dense, tmp_path / "a", tiny_config())
    prune(dense, tmp_path / "b", tiny_config())
    assert model_files(tmp_path / "a") == model_files(tmp_path / "b")


@pytest.mark.parametrize("targets", ["attention", "ffn"])
def test_only_one_kind_can_be_pruned(dense, tmp_path, tiny_config, targets):
    report = prune(dense, tmp_path / "out", tiny_config(targets=targets, ratio=0.15))
    assert report.ratio == pytest.approx(0.15, abs=0.05)
    for layer in report.layers:
        assert layer.intermediate_size == 128 or targets == "ffn"
        assert layer.num_attention_heads == 8 or targets == "attention"


def test_heads_are_removed_only_where_they_cost_less_than_the_ffn(dense, tmp_path, tiny_config):
    """The price of a head is what the FFN of the layer before paid for a parameter; the ratio is met either way."""
    cheap, dear = tmp_path / "cheap", tmp_path / "dear"
    for folder, scale in ((cheap, 1e-3), (dear, 1e3)):
        shutil.copytree(dense, folder)
        tensors = load_file(folder / "model.safetensors")
        for name in tensors:
            if "o_proj" in name:
                tensors[name] *= scale
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = tiny_config(ratio=0.2)
    few, many = prune(cheap, tmp_path / "cheap_out", config), prune(dear, tmp_path / "dear_out", config)
    assert all(layer.num_attention_heads == 8 for layer in many.layers)
    before, after = load(dear), load(tmp_path / "dear_out")
    for a, b in zip(before.model.layers, after.model.layers, strict=True):  # looked at and left alone: not refitted
        assert torch.equal(a.self_attn.o_proj.weight, b.self_attn.o_proj.weight)
    assert few.layers[0].num_attention_heads == 8  # nothing to compare with yet
    assert any(layer.num_attention_heads < 8 for layer in few.layers[1:])
    assert few.ratio == pytest.approx(0.2, abs=0.005)
    assert many.ratio == pytest.approx(0.2, abs=0.005)


def test_heads_are_removed_at_any_price_where_the_ffn_is_not_enough(dense, tmp_path, tiny_config):
    report = prune(dense, tmp_path / "out", tiny_config(ratio=0.7, schedule="uniform"))
    assert report.ratio == pytest.approx(0.7, abs=0.005)
    assert all(layer.num_attention_heads < 8 for layer in report.layers)


def test_nan_in_a_weight_stops_the_run_with_the_layers_name(dense, tmp_path, tiny_config):
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="layer 2"):
        prune(broken, tmp_path / "out", tiny_config())
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_outlier_channel_of_1e4_still_gives_a_finite_model(dense, tmp_path, tiny_config):
    wild = tmp_path / "wild"
    shutil.copytree(dense, wild)
    tensors = load_file(wild / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7] *= 1e4
    tensors["model.layers.1.mlp.up_proj.weight"][9] = 0
    save_file(tensors, wild / "model.safetensors", metadata={"format": "pt"})
    report = prune(wild, tmp_path / "out", tiny_config(num_samples=1, seq_len=16))  # fewer tokens than columns
    assert all(bool(p.isfinite().all()) for p in load(tmp_path / "out").parameters())
    assert 9 not in report.layers[1].kept_channels


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 0.3, "ffn_multiple": 128}, "ratio 0.3 cannot be met"),
        ({"ratio": 0.5, "targets": "attention"}, "cannot be met"),
        ({"head_multiple": 3}, "layer 0 has 8 heads; head_multiple 3"),
        ({"num_samples": 10_000, "seq_len": 512}, "ask for at most"),
        ({"device": "warp"}, "device 'warp' is not usable"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(dense, tmp_path, tiny_config, fields, message):
    with pytest.raises(ValueError, match=message):
        prune(dense, tmp_path / "out", tiny_config(**fields))
    assert not (tmp_path / "out").exists()


def test_a_ratio_that_is_missed_by_more_than_half_a_point_is_warned_of(tmp_path, tiny_config, caplog):
    """A second pruning of three layers, whose head units are a large share of what is left."""
    dense = write_dense(tmp_path / "dense")
    given = {"num_samples": 8, "seq_len": 64, "calibration": "python", "ffn_multiple": 8}
    prune(dense, tmp_path / "first", tiny_config(**given, ratio=0.25))
    assert "were requested" not in caplog.text
    with caplog.at_level("WARNING", logger="slimgpt"):
        report = prune(tmp_path / "first", tmp_path / "second", tiny_config(**given, ratio=0.4))
    assert abs(report.ratio - 0.4) > 0.005
    reached = f"{100 * report.ratio:.2f}% of the projections' parameters were removed, 40.00% were requested"
    assert reached in caplog.text and "ffn_multiple, which is 8; a lower one comes closer" in caplog.text
