"""What stays of one map: chosen from its weight and H, refitted, applied, and the same on every rank.

Shapes: D = hidden size, A = heads * head_dim, F = FFN width, K = kept columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgpt.checkpoints.families import Family
from slimgpt.checkpoints.pruned_form import slice_rows
from slimgpt.config import PruneConfig
from slimgpt.engine.ranks import Ranks
from slimgpt.method import obs
from slimgpt.method.selection import HeadPath, channel_path, head_path
from slimgpt.method.shapes import HeadLayout, LayerShape, Unit
from slimgpt.report import LayerReport
from slimgpt.usage import return_freed_memory


@dataclass(frozen=True)
class Kept:
    """What stays of one map: the kept units of the layer as it came, and the refitted weight in its stored dtype.

    Attributes:
        heads: query heads (of ``o_proj``).
        kv_heads: kv heads.
        columns_K: columns of the dense weight.
        weight_DK: the weight on them.
        error: ``||W X - W' X||^2 / ||W X||^2`` of the rounded weight.
        damping: what was added to H's diagonal, as a share of its mean.
        marginal_error: error of the last channel that went.
    """

    heads: list[int]
    kv_heads: list[int]
    columns_K: Tensor
    weight_DK: Tensor
    error: float = 0.0
    damping: float = 0.0
    marginal_error: float = 0.0

    def applied(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The pruned map as a function of the dense one's input."""
        # contiguous as it comes back from a file: a matrix product's last bit may depend on the layout
        weight_DK = self.weight_DK.to(device, dtype).contiguous()
        columns_K = self.columns_K.to(device)
        if device.type == "cuda" and (odd := len(columns_K) % obs.ALIGNED):  # kernels are fast for whole rows
            columns_K, weight_DK = (functional.pad(x, (0, obs.ALIGNED - odd)) for x in (columns_K, weight_DK))

        def apply(x: Tensor) -> Tensor:
            return functional.linear(x.index_select(-1, columns_K), weight_DK, linear.bias)

        return apply


def all_heads(weight_DA: Tensor, layout: HeadLayout) -> Kept:
    """Every head stays."""
    heads = list(range(layout.num_heads))
    return Kept(heads, list(range(layout.num_kv_heads)), layout.columns(heads), weight_DA)


def all_channels(weight_DF: Tensor) -> Kept:
    """Every channel stays."""
    return Kept([], [], torch.arange(weight_DF.shape[1]), weight_DF)


def choose_heads(
    weight_DA: Tensor,
    gram: obs.Gram,
    layout: HeadLayout,
    config: PruneConfig,
    *,
    limit: float,
    order: Sequence[tuple[int, int]] | None,
    cut: Callable[[HeadPath], int],
    root_DD: Tensor | None = None,
) -> Kept:
    """Order the units of heads within ``limit`` parameters, take as many as ``cut`` says, and refit ``o_proj``.

    ``order`` as of ``head_path``; ``root_DD``: R with ``R^T R = G``, where errors count in nats.
    """
    W_DA, H_AA, inverse = _inverted(weight_DA, gram, config)
    path = head_path(
        _weighed(obs.silence_dead_columns(W_DA, H_AA), root_DD),
        inverse.P_DD,
        layout,
        unit=config.head_unit,
        head_error=config.head_error,
        multiple=config.head_multiple,
        limit=limit,
        order=order,
        name=gram.name,
    )
    count = cut(path)
    if count == 0:
        return all_heads(weight_DA, layout)
    heads, kv_heads = path.kept(count)
    kept = _refit(W_DA, H_AA, inverse, layout.columns(heads), weight_DA.dtype)
    return replace(kept, heads=heads, kv_heads=kv_heads)


def choose_channels(
    weight_DF: Tensor, gram: obs.Gram, count: int, config: PruneConfig, root_DD: Tensor | None = None
) -> Kept:
    """Choose the channels that stay, when ``count`` go, and refit ``down_proj``; ``root_DD`` as of ``choose_heads``."""
    return_freed_memory()  # what the forward pass left: here memory is at its peak
    W_DF, H_FF, inverse = _inverted(weight_DF, gram, config)
    path = channel_path(
        _weighed(obs.silence_dead_columns(W_DF, H_FF), root_DD),
        inverse.P_DD,
        count,
        group_size_max=config.group_size_max,
        group_size_min=config.group_size_min,
        name=gram.name,
    )
    stays_F = torch.ones(W_DF.shape[1], dtype=torch.bool, device=H_FF.device)
    stays_F[path.order] = False
    inverse = inverse._replace(P_DD=H_FF[:0, :0])  # free it: the refit needs the shift alone
    kept = _refit(W_DF, H_FF, inverse, stays_F.nonzero().flatten(), weight_DF.dtype)
    return replace(kept, marginal_error=path.marginal_error())


def _weighed(W_OD: Tensor, root_OO: Tensor | None) -> Tensor:
    return W_OD if root_OO is None else root_OO.to(W_OD.device).to(W_OD.dtype) @ W_OD


def _inverted(weight_DF: Tensor, gram: obs.Gram, config: PruneConfig) -> tuple[Tensor, Tensor, obs.Inverse]:
    """The weight in H's dtype and on its device, H without damping, and its damped inverse."""
    H_FF = gram.finish()
    # moved as it is stored: torch would convert it first, and move four times as much
    return weight_DF.to(H_FF.device).to(H_FF.dtype), H_FF, obs.invert(H_FF, config.percdamp, gram.name)


def _refit(W_DF: Tensor, H_FF: Tensor, inverse: obs.Inverse, columns_K: Tensor, dtype: torch.dtype) -> Kept:
    """Solve for the kept columns and round to the stored dtype; the error is that of the rounded weight."""
    columns_K = columns_K.to(H_FF.device)
    weight_DK, error = obs.refit(W_DF, H_FF, inverse.shift, columns_K, dtype)
    return Kept([], [], columns_K.cpu(), weight_DK.cpu(), error, inverse.damping)


def agree(ranks: Ranks, device: torch.device, decide: Callable[[], Kept]) -> Kept:
    """Let the first rank decide for all.

    Each could decide alone from the same H. But a last bit that differs, from another GPU or another library, may tip
    the choice between two heads, and from there on the ranks would sum the statistics of different models.
    """
    if ranks.count == 1:
        return decide()
    weights: list[Tensor] = []  # large, so it goes from device to device and not with the rest

    def without_weight() -> Kept:
        kept = decide()
        weights.append(kept.weight_DK)
        return replace(kept, weight_DK=kept.weight_DK.to("meta"))

    kept = ranks.from_first(without_weight)
    weight_DK = weights[0].to(device) if weights else torch.empty_like(kept.weight_DK, device=device)
    weight_DK = weight_DK.contiguous()
    ranks.copy(weight_DK)
    return replace(kept, weight_DK=weight_DK.cpu())


def sliced(
    dense: dict[str, Tensor], family: Family, shape: LayerShape, attention: Kept, ffn: Kept
) -> dict[str, Tensor]:
    """The pruned layer's tensors: what is gone is sliced away, never just zeroed."""
    rows: dict[Unit, Tensor] = {
        "query": shape.heads.columns(attention.heads),
        "kv": shape.heads.columns(attention.kv_heads),
        "channel": ffn.columns_K,
    }
    pruned = slice_rows(dense, family, shape, rows)
    pruned[f"{family.output}.weight"] = attention.weight_DK
    pruned[f"{family.down}.weight"] = ffn.weight_DK
    return pruned


def report_of(index: int, dense: LayerShape, attention: Kept, ffn: Kept, *, gain: float, seconds: float) -> LayerReport:
    """What was decided for one layer; ``gain`` is that of the norm behind ``down_proj``."""
    after = replace(
        dense,
        num_heads=len(attention.heads),
        num_kv_heads=len(attention.kv_heads),
        intermediate_size=len(ffn.columns_K),
    )
    return LayerReport(
        layer=index,
        num_attention_heads=after.num_heads,
        num_key_value_heads=after.num_kv_heads,
        intermediate_size=after.intermediate_size,
        dense_num_attention_heads=dense.num_heads,
        dense_num_key_value_heads=dense.num_kv_heads,
        dense_intermediate_size=dense.intermediate_size,
        kept_heads=attention.heads,
        kept_kv_heads=attention.kv_heads,
        kept_channels=ffn.columns_K.tolist(),
        attention_error=attention.error,
        ffn_error=ffn.error,
        attention_damping=attention.damping,
        ffn_damping=ffn.damping,
        ffn_price=ffn.marginal_error * gain / dense.channel_parameters,
        ratio=1 - after.parameters / dense.parameters,
        seconds=seconds,
    )
