"""Every family: the pruned model computes what the dense model computes with the pruned columns at zero."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Phi3Config, Qwen2Config

from slimgpt.checkpoints.families import FAMILIES, family_of, positions
from slimgpt.checkpoints.loading import load_causal_lm
from slimgpt.config import EvalConfig
from slimgpt.data.calibration import calibrate
from slimgpt.data.text import perplexity_text
from slimgpt.engine.pruner import prune
from slimgpt.evaluation.harness import evaluate
from slimgpt.evaluation.perplexity import perplexity
from slimgpt.report import load_report
from tests.tiny_families import CASES, PRUNE, write_baichuan, write_family, write_multimodal_gemma3

PROMPTS = torch.tensor([[5, 80, 200, 31, 7, 44, 91, 3], [300, 12, 9, 411, 66, 2, 150, 28]])


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def dense_twin(dense, out):
    """The dense model with the pruned columns at zero and the other columns from the pruned model."""
    model, report = load(dense, attn_implementation="eager"), load_report(out)
    tensors = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for layer, kept in zip(model.model.layers, report.layers, strict=True):
        head_dim = layer.self_attn.head_dim
        columns = torch.cat([torch.arange(h * head_dim, (h + 1) * head_dim) for h in kept.kept_heads])
        prefix = f"model.layers.{kept.layer}."
        for linear, which, name in (
            (layer.self_attn.o_proj, columns, "self_attn.o_proj"),
            (layer.mlp.down_proj, torch.tensor(kept.kept_channels), "mlp.down_proj"),
        ):
            weight = torch.zeros_like(linear.weight)
            weight[:, which] = tensors[f"{prefix}{name}.weight"]
            linear.weight = torch.nn.Parameter(weight)
    return model


@pytest.fixture(scope="module", params=CASES)
def pruned(request, pruned_family):
    return *pruned_family(request.param), PRUNE


def test_logits_equal_those_of_the_dense_model_with_the_pruned_columns_at_zero(pruned):
    dense, out, _ = pruned
    model = load(out)
    assert type(model).__name__.startswith("Slim")
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPTS).logits, dense_twin(dense, out)(PROMPTS).logits, rtol=1e-4, atol=1e-4)
    longer = calibrate(dense, str(pruned[2].calibration), num_samples=2, seq_len=64, seed=1).ids_NT  # past every window
    with torch.no_grad():
        torch.testing.assert_close(model(longer).logits, dense_twin(dense, out)(longer).logits, rtol=1e-4, atol=1e-4)


def test_the_familys_stock_class_cannot_load_it(pruned):
    """Neither the class by name nor ignore_mismatched_sizes gives a model of dense widths."""
    _, out, _ = pruned
    config = AutoConfig.from_pretrained(out)
    family = family_of(config)
    assert config.model_type == family.slim != family.model_type
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(RuntimeError, match="is a per-layer attribute"):
            getattr(transformers, family.stock_class).from_pretrained(out, **options)


def test_kept_weights_are_the_least_squares_optimum_for_the_layers_inputs(pruned):
    """Hooks on the twin give X of every layer after the pruning of those before: W' = W H_:K (H_KK)^-1 in float64."""
    dense, out, config = pruned
    twin, original, report = dense_twin(dense, out), load(dense), load_report(out)
    ids_NT = calibrate(
        dense, config.calibration, num_samples=config.num_samples, seq_len=config.seq_len, seed=config.seed
    ).ids_NT
    seen = {}
    for name, module in twin.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].double()))
    with torch.no_grad():
        twin(ids_NT)
    for kept in report.layers:
        for name, damping in (("self_attn.o_proj", kept.attention_damping), ("mlp.down_proj", kept.ffn_damping)):
            path = f"model.layers.{kept.layer}.{name}"
            X_TD, W_OD = seen[path].flatten(0, 1), original.get_submodule(path).weight.double()
            H_DD = X_TD.T @ X_TD
            H_DD += damping * H_DD.diagonal().mean() * torch.eye(len(H_DD), dtype=torch.float64)
            K = twin.get_submodule(path).weight.abs().sum(0).nonzero().flatten()
            if damping == 0:  # untouched
                assert len(K) == len(H_DD)
                continue
            optimum_OK = torch.linalg.solve(H_DD[K[:, None], K], H_DD[K] @ W_OD.T).T
            stored_OK = twin.get_submodule(path).weight[:, K].double()
            assert (stored_OK - optimum_OK).norm().item() < 1e-3 * optimum_OK.norm().item(), path


def test_ratio_and_counts_match_the_files(pruned):
    dense, out, config = pruned
    report = load_report(out)
    counts = [sum(p.numel() for p in load(folder).parameters()) for folder in (dense, out)]
    assert [report.parameters_before, report.parameters_after] == counts
    assert abs(report.ratio - config.ratio) <= 0.005
    heads = {layer.num_attention_heads for layer in report.layers}
    assert (heads == {8}) == (family_of(AutoConfig.from_pretrained(dense)).prunes_heads is False)


def test_config_is_unchanged_except_for_the_widths(pruned):
    dense, out, _ = pruned
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (dense, out))
    changed = {key for key in before if before[key] != after.get(key)}
    assert changed <= {"model_type", "architectures", "transformers_version", "head_dim", "dtype", "use_cache"}, changed


def test_heads_are_priced_in_families_with_norms_before_the_residual(tmp_path, tiny_config):
    """Gemma's post norms rescale the output of a map, so attention and FFN errors are compared after them."""
    dense = write_family(tmp_path / "dense", "gemma2")
    report = prune(dense, tmp_path / "out", tiny_config(ratio=0.3))
    assert abs(report.ratio - 0.3) <= 0.005
    scaled = load(dense)
    for layer in scaled.model.layers:  # the same function: the norm behind the map undoes the scale
        layer.self_attn.o_proj.weight.data *= 64
    scaled.save_pretrained(tmp_path / "scaled")
    for path in dense.glob("*token*"):
        (tmp_path / "scaled" / path.name).write_bytes(path.read_bytes())
    again = prune(tmp_path / "scaled", tmp_path / "out2", tiny_config(ratio=0.3))
    assert [layer.kept_heads for layer in again.layers] == [layer.kept_heads for layer in report.layers]


def test_a_family_whose_heads_cannot_be_pruned_reports_it(tmp_path, tiny_config, caplog):
    dense = write_family(tmp_path / "dense", "olmo2")
    with pytest.raises(ValueError, match="olmo2.*norms span all heads.*targets ffn"):
        prune(dense, tmp_path / "out", tiny_config(targets="attention"))
    prune(dense, tmp_path / "out", tiny_config())
    assert "only its FFN is pruned" in caplog.text
    assert load_report(tmp_path / "out").config["targets"] == "ffn"


@pytest.mark.parametrize("write", [write_baichuan, write_multimodal_gemma3])
def test_a_family_under_other_names_gives_the_same_model(write, tmp_path, tiny_config):
    other, plain = write(tmp_path)
    reports = [prune(model, tmp_path / f"out{i}", tiny_config()) for i, model in enumerate((other, plain))]
    assert [r.parameters_after for r in reports] == [reports[0].parameters_after] * 2
    for path in (tmp_path / "out1").glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "out0" / path.name), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(load(tmp_path / "out0")(PROMPTS).logits, load(tmp_path / "out1")(PROMPTS).logits)


@pytest.mark.parametrize("write", [write_baichuan, write_multimodal_gemma3])
def test_a_dense_model_under_other_names_is_measured_as_what_it_is(write, tmp_path):
    """No code of the checkpoint's own is run for it."""
    config = EvalConfig(tasks=("none",), perplexity="python", seq_len=64, max_blocks=2)
    other, plain = (evaluate(model, config) for model in write(tmp_path))
    assert other.metrics == plain.metrics
    assert other.metrics["python/perplexity"] > 1


def test_a_tensor_that_a_model_under_other_names_lacks_is_named(tmp_path):
    baichuan, _ = write_baichuan(tmp_path)
    tensors = load_file(baichuan / "model.safetensors")
    del tensors["model.layers.1.self_attn.W_pack.weight"]
    save_file(tensors, baichuan / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no tensor model.layers.1.self_attn.k_proj.weight"):
        load_causal_lm(baichuan, torch.float32)


def test_baichuan_without_rotary_embeddings_is_refused(tmp_path, tiny_config):
    baichuan, _ = write_baichuan(tmp_path)
    config = json.loads((baichuan / "config.json").read_text())
    del config["max_position_embeddings"]
    (baichuan / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="ALiBi.*7B"):
        prune(baichuan, tmp_path / "out", tiny_config())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts.*supported: llama, mistral"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "mixture of experts"),
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: llama, mistral, qwen2"),
        ({"model_type": "no_such_type"}, "'no_such_type' cannot be read"),
    ],
)
def test_unsupported_models_are_refused_with_the_supported_ones(config, message, tmp_path, tiny_config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        prune(tmp_path, tmp_path / "out", tiny_config())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_every_family_has_a_case():
    assert {family.model_type for family in FAMILIES} == {model_type for model_type, _ in CASES.values()}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=2048), 2048),
        (LlamaConfig(max_position_embeddings=512, rope_scaling={"rope_type": "default", "factor": None}), 512),
        (LlamaConfig(max_position_embeddings=4096, rope_scaling={"type": "linear", "factor": 4.0}), 16384),
        (
            LlamaConfig(
                max_position_embeddings=131072,
                rope_scaling={
                    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
                    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                },
            ),
            131072,
        ),
        (
            Qwen2Config(
                max_position_embeddings=32768,
                rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            ),
            131072,
        ),
        (
            Phi3Config(
                max_position_embeddings=131072,
                original_max_position_embeddings=4096,
                rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
            ),
            131072,
        ),
    ],
    ids=["plain", "default", "vicuna 16k", "llama 3.1", "qwen 2.5 with yarn", "phi 3"],
)
def test_a_model_reads_as_many_tokens_as_its_makers_say(config, expected):
    assert positions(config) == expected


def test_the_soft_cap_is_used_in_the_evaluation(tmp_path, text_file):
    """torch's sdpa would ignore it: the perplexity must equal that of the eager model."""
    dense = write_family(tmp_path / "dense", "gemma2")
    request = EvalConfig(tasks=("none",), perplexity=str(text_file), seq_len=64, max_blocks=2)
    measured = evaluate(dense, request).metrics
    capped, uncapped = (load(dense, attn_implementation=kernel) for kernel in ("eager", "sdpa"))
    tokenizer, text = AutoTokenizer.from_pretrained(dense), perplexity_text(str(text_file))
    expected, other = (
        perplexity(model, tokenizer, text, seq_len=64, max_blocks=2).perplexity for model in (capped, uncapped)
    )
    (value,) = (value for name, value in measured.items() if name.endswith("/perplexity"))
    assert value == pytest.approx(expected, rel=1e-5)
    assert abs(other / expected - 1) > 1e-3  # or the test would show nothing
