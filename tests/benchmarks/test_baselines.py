"""Other methods: each removes what it was asked for; the formulas of most are computed again by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.baselines import METHODS, flap, osscar, putri, shortgpt, taylor, two_ssp, wanda_sp
from benchmarks.removal import Removal, walk
from tests.tiny_models import VOCAB_SIZE, write_dense

LAYERS, WIDTH = 10, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("dense"), num_hidden_layers=LAYERS)


@pytest.fixture
def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def ids_NT():
    return torch.randint(VOCAB_SIZE, (8, 32), generator=torch.Generator().manual_seed(0))


def inputs_of(model, ids_NT, name):
    """What this map is given, ``[tokens, columns]``, by one forward pass of the whole model."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=ids_NT)
    hook.remove()
    return torch.cat(seen).double()


def loss(model, ids_NT):
    with torch.no_grad():
        return float(model(input_ids=ids_NT, labels=ids_NT).loss)


@pytest.mark.parametrize("ratio", [0.1, 0.3])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_removes_the_ratio_and_what_is_gone_adds_nothing(name, ratio, dense, ids_NT):
    removal = Removal(dense)
    METHODS[name](removal, ids_NT, ratio)
    unit = removal.shapes[0].heads.cost(2, 1) / removal.shapes[0].parameters / LAYERS  # of FLAP the largest
    assert abs(removal.ratio - ratio) <= unit
    for i, layer in enumerate(removal.layers):
        assert not layer.mlp.down_proj.weight[:, removal.channels[i]].any()
        assert not layer.self_attn.o_proj.weight[:, removal.columns(i, removal.groups[i])].any()
    with torch.no_grad():
        assert dense(input_ids=ids_NT).logits.isfinite().all()


def test_statistics_layer_by_layer_are_those_of_the_whole_model(dense, ids_NT):
    seen = []
    walk(dense, ids_NT, lambda _, heads, channels: bool(seen.append((heads, channels))), gram=True)
    for i in (0, LAYERS - 1):
        heads, channels = seen[i]
        x_TA = inputs_of(dense, ids_NT, f"model.layers.{i}.self_attn.o_proj")
        x_TF = inputs_of(dense, ids_NT, f"model.layers.{i}.mlp.down_proj")
        torch.testing.assert_close(heads.mean_D, x_TA.mean(dim=0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(heads.variance_D, x_TA.var(dim=0, correction=0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(
            channels.norms_D / 8, x_TF.view(8, 32, -1).norm(dim=1).mean(dim=0), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(channels.gram.finish(), x_TF.T @ x_TF, rtol=1e-3, atol=1e-4)


def test_wanda_sp_prunes_a_layer_by_the_inputs_that_the_pruned_ones_before_it_give(dense, ids_NT):
    removal = Removal(dense)
    weights = [layer.mlp.down_proj.weight.detach().clone() for layer in removal.layers]
    wanda_sp(removal, ids_NT, 0.3)
    for i in (0, 1, LAYERS - 1):
        x_TF = inputs_of(dense, ids_NT, f"model.layers.{i}.mlp.down_proj")  # not changed by the layer's own pruning
        score_F = (weights[i].abs() * x_TF.norm(dim=0)).sum(dim=0)
        gone = removal.channels[i]
        assert score_F[gone].max() < score_F[~gone].min()


def test_flap_leaves_the_mean_of_each_maps_output_as_it_was(dense, folder, ids_NT):
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    removal = Removal(dense)
    flap(removal, ids_NT, 0.3)
    assert any(groups.any() for groups in removal.groups)
    assert any(channels.any() for channels in removal.channels)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        for i in range(LAYERS):
            x = inputs_of(before, ids_NT, f"model.layers.{i}.{name}").float()
            old, new = (model.get_submodule(f"model.layers.{i}.{name}") for model in (before, dense))
            torch.testing.assert_close(old(x).mean(dim=0), new(x).mean(dim=0), rtol=1e-3, atol=1e-4)


def test_2ssp_removes_as_many_attention_modules_as_its_equation_says(dense, ids_NT):
    removal = Removal(dense)
    shape = removal.shapes[0]
    two_ssp(removal, ids_NT, 0.5)
    share = 3 * 64 * WIDTH / shape.heads.parameters / 1.5
    assert sum(bool(groups.all()) for groups in removal.groups) == round(LAYERS * 0.5**share) > 0
    assert removal.ratio == pytest.approx(0.5, abs=0.01)


def test_a_refit_and_exact_errors_each_make_the_first_map_closer(dense, folder, ids_NT):
    x_TF = inputs_of(dense, ids_NT, "model.layers.0.mlp.down_proj")
    wanted = x_TF @ dense.model.layers[0].mlp.down_proj.weight.detach().double().T
    errors = []
    for method in (wanda_sp, putri, osscar):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        method(Removal(model), ids_NT, 0.3)
        given = inputs_of(model, ids_NT, "model.layers.0.mlp.down_proj")
        made = given @ model.model.layers[0].mlp.down_proj.weight.detach().double().T
        errors.append(float((made - wanted).square().sum()))
    assert errors[2] < errors[1] < errors[0]


def test_taylor_is_weight_times_gradient_and_spares_the_outer_layers(dense, folder, ids_NT):
    removal = Removal(dense)
    taylor(removal, ids_NT, 0.3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sum(model(input_ids=ids_T[None], labels=ids_T[None]).loss for ids_T in ids_NT).backward()
    mlp = model.model.layers[4].mlp
    score_F = sum(
        (p.detach() * p.grad).abs().sum(dim=dim)
        for p, dim in ((mlp.gate_proj.weight, 1), (mlp.up_proj.weight, 1), (mlp.down_proj.weight, 0))
    )
    assert score_F[removal.channels[4]].max() < score_F[~removal.channels[4]].min()
    assert [bool(channels.any()) for channels in removal.channels] == [False, *[True] * 7, False, False]


def test_shortgpt_removes_the_layer_that_does_nothing(dense, ids_NT):
    idle = dense.model.layers[4]
    idle.mlp.down_proj.weight.data.zero_()
    idle.self_attn.o_proj.weight.data.zero_()
    before, removal = loss(dense, ids_NT), Removal(dense)
    shortgpt(removal, ids_NT, 0.1)
    assert removal.channels[4].all() and removal.groups[4].all()
    assert loss(dense, ids_NT) == before
