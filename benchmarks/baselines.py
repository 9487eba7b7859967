"""Other structured pruning methods, from their papers' formulas, each on the same dense model and calibration tokens.

Each takes a Removal, calibration sequences ``[N, T]`` and the share of projection parameters to remove, and changes the
model in place. Where a paper leaves a choice, it is the one that was strongest in this project's measurements of the
authors' code: a whole kv group of every layer costs small models dear, so that most of these prune the FFN alone.
None of them sees another text than the calibration's.

Shapes as in removal.py; O = output features.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.removal import Inputs, Removal, walk
from slimgpt.method import obs

GROUP = 8  # channels that go together where columns are eliminated one after the other
PERCDAMP = 0.01


def random_channels(removal: Removal, ids_NT: Tensor, ratio: float) -> None:  # noqa: ARG001
    """Any channels, the same number in every layer: what a method has to beat."""
    count, draw = removal.channels_to_go(ratio, len(removal.layers)), torch.Generator().manual_seed(0)
    for i, gone_F in enumerate(removal.channels):
        removal.drop_channels(i, torch.randperm(len(gone_F), generator=draw)[:count])


def magnitude(removal: Removal, ids_NT: Tensor, ratio: float) -> None:  # noqa: ARG001
    """The channels with the smallest weights: the squares of gate's and up's row and of down's column."""
    count = removal.channels_to_go(ratio, len(removal.layers))
    for i, layer in enumerate(removal.layers):
        rows_F = layer.mlp.gate_proj.weight.square().sum(dim=1) + layer.mlp.up_proj.weight.square().sum(dim=1)
        removal.drop_channels(i, (rows_F + layer.mlp.down_proj.weight.square().sum(dim=0)).argsort()[:count])


def wanda_sp(removal: Removal, ids_NT: Tensor, ratio: float) -> None:
    """Wanda's score summed over a channel, ``sum_o |W_oj| ||x_j||`` (FLAP's paper, appendix), layer after layer."""
    count = removal.channels_to_go(ratio, len(removal.layers))

    def visit(i: int, heads: Inputs, channels: Inputs) -> bool:  # noqa: ARG001
        weight_DF = removal.layers[i].mlp.down_proj.weight
        removal.drop_channels(i, (weight_DF.abs().sum(dim=0) * channels.squares_D.sqrt()).argsort()[:count])
        return True

    walk(removal.model, ids_NT, visit)


def flap(removal: Removal, ids_NT: Tensor, ratio: float) -> None:
    """FLAP (AAAI 2024): fluctuation ``Var(x_j) ||W_:,j||^2``, standardised, one threshold for all; a bias makes up.

    Units are FFN channels and heads, sorted over all layers; a head, or a group that shares keys and values, has the
    mean of its columns' standardised scores, as in the authors' code. What leaves is replaced by its mean, as a bias.
    """
    scores: list[Tensor] = []
    means: list[tuple[Tensor, Tensor]] = []

    def visit(i: int, heads: Inputs, channels: Inputs) -> bool:
        layer, shape = removal.layers[i], removal.shapes[i]
        fluctuation_A = heads.variance_D * layer.self_attn.o_proj.weight.double().square().sum(dim=0)
        fluctuation_F = channels.variance_D * layer.mlp.down_proj.weight.double().square().sum(dim=0)
        means.append((heads.mean_D, channels.mean_D))
        of_columns, of_channels = ((score - score.mean()) / score.std() for score in (fluctuation_A, fluctuation_F))
        scores.extend((of_columns.view(shape.num_kv_heads, -1).mean(dim=1), of_channels))
        return False

    walk(removal.model, ids_NT, visit)
    shape = removal.shapes[0]
    costs = shape.heads.cost(shape.num_heads // shape.num_kv_heads, 1), shape.channel_parameters
    cost = torch.cat([torch.full((len(score),), costs[k % 2]) for k, score in enumerate(scores)])
    order = torch.cat(scores).argsort()
    budget = ratio * sum(shape.parameters for shape in removal.shapes)
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[order[: int((cost[order].cumsum(0) <= budget).sum())]] = True
    parts = gone.split([len(score) for score in scores])
    for i, layer in enumerate(removal.layers):
        mean_A, mean_F = means[i]
        for linear, mean, mask in (
            (layer.self_attn.o_proj, mean_A, removal.columns(i, parts[2 * i])),
            (layer.mlp.down_proj, mean_F, parts[2 * i + 1]),
        ):
            if bool(mask.any()):
                removal.add_bias(linear, linear.weight.data @ (mean * mask).to(linear.weight.dtype))
        removal.drop_groups(i, parts[2 * i])
        removal.drop_channels(i, parts[2 * i + 1])


def taylor(removal: Removal, ids_NT: Tensor, ratio: float) -> None:
    """LLM-Pruner (NeurIPS 2023): first-order Taylor, ``sum |w dL/dw|`` over a channel; the outer layers are left alone.

    FFN channels of all layers but the first tenth and the last two, as its scripts choose them for 32 layers.
    """
    layers = range(round(len(removal.layers) / 10), len(removal.layers) - 2)
    count = removal.channels_to_go(ratio, len(layers))
    weights = {
        i: [removal.layers[i].mlp.get_submodule(name).weight for name in ("gate_proj", "up_proj", "down_proj")]
        for i in layers
    }
    for parameter in removal.model.parameters():
        parameter.requires_grad_(False)
    for weight in (weight for of in weights.values() for weight in of):
        weight.requires_grad_(True)
    for ids_T in ids_NT:
        removal.model(input_ids=ids_T[None], labels=ids_T[None], use_cache=False).loss.backward()
    for i, (gate_FD, up_FD, down_DF) in weights.items():
        score_F = sum((x_FD.detach() * x_FD.grad).abs().sum(dim=1) for x_FD in (gate_FD, up_FD))
        score_F += (down_DF.detach() * down_DF.grad).abs().sum(dim=0)
        removal.drop_channels(i, score_F.argsort()[:count])
    removal.model.zero_grad(set_to_none=True)


def two_ssp(removal: Removal, ids_NT: Tensor, ratio: float) -> None:
    """2SSP (TMLR 2025): channels by the mean norm of their activations, then attention modules by perplexity.

    Attention modules: ``round(L s^(w_ffn / (1.5 w_attn)))`` (its eq. 5), each the one whose absence hurts the first
    calibration sequence least.
    """
    shape, layers = removal.shapes[0], removal.layers
    ffn = shape.channel_parameters * shape.intermediate_size
    modules = round(len(layers) * ratio ** (ffn / shape.heads.parameters / 1.5))
    count = removal.channels_to_go(
        ratio - modules * shape.heads.parameters / (len(layers) * shape.parameters), len(layers)
    )
    scores: list[Tensor] = []
    walk(removal.model, ids_NT, lambda i, heads, channels: bool(scores.append(channels.norms_D)))  # noqa: ARG005
    for i, score_F in enumerate(scores):
        removal.drop_channels(i, score_F.argsort()[:count])
    everything = torch.ones(shape.num_kv_heads, dtype=torch.bool)
    for _ in range(modules):
        losses = {i: _loss_without(removal, i, ids_NT[:1]) for i in range(len(layers)) if not removal.groups[i].all()}
        removal.drop_groups(min(losses, key=losses.__getitem__), everything)


@torch.no_grad()
def _loss_without(removal: Removal, i: int, ids_BT: Tensor) -> float:
    weight = removal.layers[i].self_attn.o_proj.weight
    before, weight.data = weight.data, torch.zeros_like(weight)
    loss = float(removal.model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss)
    weight.data = before
    return loss


def putri(removal: Removal, ids_NT: Tensor, ratio: float) -> None:
    """Putri's FFN stage (2026): 2SSP's scores, the rest of down_proj refitted, layer after layer."""
    count = removal.channels_to_go(ratio, len(removal.layers))
    _refitted(removal, ids_NT, lambda channels, W_DF, inverse: channels.norms_D.argsort()[:count])  # noqa: ARG005


def osscar(removal: Removal, ids_NT: Tensor, ratio: float) -> None:
    """After OSSCAR (ICML 2024): channels go by the exact error of the refitted rest, a few at a time, then a refit.

    Its local search, which swaps channels at the end, is left out.
    """
    count = removal.channels_to_go(ratio, len(removal.layers))

    def chosen(channels: Inputs, W_DF: Tensor, inverse: obs.Inverse) -> Tensor:  # noqa: ARG001
        elimination, gone = obs.Elimination(W_DF, inverse.P_DD, capacity=count), []
        for start in range(0, count, GROUP):
            gone.append(elimination.column_errors().argsort()[: min(GROUP, count - start)])
            elimination.remove(gone[-1])
        return torch.cat(gone) if gone else torch.empty(0, dtype=torch.long)

    _refitted(removal, ids_NT, chosen)


def _refitted(removal: Removal, ids_NT: Tensor, choose: Callable[[Inputs, Tensor, obs.Inverse], Tensor]) -> None:
    """Remove the chosen channels layer after layer, and refit ``down_proj`` by least squares."""

    def visit(i: int, heads: Inputs, channels: Inputs) -> bool:  # noqa: ARG001
        weight_DF = removal.layers[i].mlp.down_proj.weight.data
        assert channels.gram is not None
        H_FF = channels.gram.finish()
        W_DF, inverse = weight_DF.to(H_FF.dtype), obs.invert(H_FF, PERCDAMP)
        removal.drop_channels(i, choose(channels, W_DF, inverse))
        kept_K = (~removal.channels[i]).nonzero().flatten()
        weight_DF[:, kept_K], _ = obs.refit(W_DF, H_FF, inverse.shift, kept_K, weight_DF.dtype)
        return True

    walk(removal.model, ids_NT, visit, gram=True)


def shortgpt(removal: Removal, ids_NT: Tensor, ratio: float) -> None:
    """ShortGPT (2024): complete layers, those that turn their input least (block influence, 1 - mean cosine)."""
    influence = [0.0] * len(removal.layers)

    def compare(i: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
        influence[i] -= float(functional.cosine_similarity(x_BTD, y_BTD, dim=-1).sum())

    walk(removal.model, ids_NT, compare=compare)
    for i in sorted(range(len(influence)), key=influence.__getitem__)[: round(ratio * len(influence))]:
        removal.drop_channels(i, torch.ones_like(removal.channels[i]))
        removal.drop_groups(i, torch.ones_like(removal.groups[i]))


METHODS = {
    "random": random_channels,
    "magnitude": magnitude,
    "ShortGPT": shortgpt,
    "Wanda-sp": wanda_sp,
    "2SSP": two_ssp,
    "FLAP": flap,
    "Taylor (LLM-Pruner)": taylor,
    "Putri": putri,
    "OSSCAR": osscar,
}
