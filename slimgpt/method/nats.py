"""What pruning a map costs in nats per token: the change of the model's own distribution, to second order.

    dKL = 1/2 tr(G dW H dW^T)       G = mean over tokens of g g^T, H = mean over tokens of x x^T

with x the input of the map and g the gradient of ``-log p(y)`` by its output, y drawn from the model's own distribution
(the true Fisher information, Kronecker-factored as in K-FAC), and bounded by curvature.py. Unlike ``||dW X||^2`` it
compares between maps. With ``R^T R = G`` it is half the squared error of R W, so the elimination of obs.py works on
R W as on any weight.

Letters as in obs.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgpt.method import obs
from slimgpt.method.selection import head_path
from slimgpt.method.shapes import HeadLayout

GROUP = 32  # channels that go together while prices are made
_JITTER = 1e-12  # of the mean diagonal, where G is singular


@dataclass(frozen=True)
class HeadOption:
    """A layout that a layer's heads may come out with.

    Attributes:
        num_heads, num_kv_heads: what stays.
        order: kinds of unit that go one after the other, as (query heads, kv heads).
        nats: the price.
    """

    num_heads: int
    num_kv_heads: int
    order: tuple[tuple[int, int], ...]
    nats: float


def root(G_OO: Tensor) -> Tensor:
    """R with ``R^T R = G``: the transposed Cholesky factor, of G and a little more on its diagonal where G is singular.

    Raises:
        ValueError: when G is not positive semi-definite, which only damaged gradients can cause.
    """
    mean = float(G_OO.diagonal().mean())
    if mean == 0:
        return torch.zeros_like(G_OO)
    jitter = 0.0
    while jitter < 1e-2:
        shifted_OO = G_OO.clone()
        shifted_OO.diagonal().add_(jitter * mean)
        L_OO, info = torch.linalg.cholesky_ex(shifted_OO)
        if not int(info):
            R_OO: Tensor = L_OO.mT.contiguous()
            return R_OO
        jitter = max(10 * jitter, _JITTER)
    raise ValueError("the gradients' second moments are not positive semi-definite: they hold NaN or infinite values")


def channel_prices(
    RW_OD: Tensor, inverse: obs.Inverse, widths: Sequence[int], tokens: int, *, group: int = GROUP
) -> list[float]:
    """The price of each width, when the cheapest channels go ``group`` at a time.

    Args:
        RW_OD: ``R W`` of ``down_proj``; dead columns silenced.
        inverse: of the damped H, a sum over ``tokens``.
        widths: channels that stay, falling.
        tokens: that H is a sum of.
        group: channels that go together.
    """
    full = RW_OD.shape[1]
    elimination = obs.Elimination(RW_OD, inverse.P_DD, capacity=full - min(widths))
    removed, error, prices = 0, RW_OD.new_zeros(()), []
    for width in widths:
        while removed < full - width:
            size = min(group, full - width - removed)
            error = error + elimination.remove(elimination.column_errors().argsort(stable=True)[:size])
            removed += size
        drift = (elimination.W_OD - RW_OD).square().sum()
        prices.append(_nats(error, drift, inverse.shift, tokens))
    return torch.stack(prices).tolist()


def head_options(
    RW_OD: Tensor,
    inverse: obs.Inverse,
    layout: HeadLayout,
    tokens: int,
    *,
    unit: str = "auto",
    multiple: int = 1,
) -> list[HeadOption]:
    """Every layout that units of heads lead to, each at its lowest price; the dense one, for nothing, comes first.

    A layout is reached by whole kv groups first and query heads of every group after, and the other way round.

    Args:
        RW_OD: ``R W`` of ``o_proj``; dead columns silenced.
        inverse: of the damped H, a sum over ``tokens``.
        layout: heads and kv groups.
        tokens: that H is a sum of.
        unit: as of ``head_path``.
        multiple: as of ``head_path``.
    """
    best = {(layout.num_heads, layout.num_kv_heads): HeadOption(layout.num_heads, layout.num_kv_heads, (), 0.0)}
    for order in unit_orders(layout, unit, multiple):
        path = head_path(RW_OD, inverse.P_DD, layout, unit=unit, multiple=multiple, order=order)
        heads, kv_heads, error = layout.num_heads, layout.num_kv_heads, 0.0
        for count, step in enumerate(path.steps, start=1):
            heads, kv_heads, error = heads - len(step.heads), kv_heads - len(step.kv_heads), error + step.error
            nats = max(0.0, error - inverse.shift * step.drift) / (2 * tokens)
            known = best.get((heads, kv_heads))
            if known is None or nats < known.nats:
                best[heads, kv_heads] = HeadOption(heads, kv_heads, order[:count], nats)
    return list(best.values())


def unit_orders(layout: HeadLayout, unit: str, multiple: int) -> list[tuple[tuple[int, int], ...]]:
    """Orders of kinds of unit that together pass every layout: one kind first, so many times, then the other."""
    orders: list[tuple[tuple[int, int], ...]] = []
    for kv_first in (True, False):
        trunk: tuple[tuple[int, int], ...] = ()
        while True:
            left = _after(layout, trunk)
            branch = _runs_out(layout, trunk, unit, multiple, kv=not kv_first)
            if branch and branch not in orders:
                orders.append(branch)
            ahead = [sizes for sizes in left.units(unit, multiple) if bool(sizes[1]) == kv_first]
            if not ahead:
                break
            trunk = (*trunk, ahead[0])
    # an order that begins another is passed on the way
    return [o for o in orders if not any(o != other and other[: len(o)] == o for other in orders)]


def _runs_out(
    layout: HeadLayout, order: tuple[tuple[int, int], ...], unit: str, multiple: int, *, kv: bool
) -> tuple[tuple[int, int], ...]:
    """``order``, and then units of one kind as long as there are any."""
    while ahead := [sizes for sizes in _after(layout, order).units(unit, multiple) if bool(sizes[1]) == kv]:
        order = (*order, ahead[0])
    return order


def _after(layout: HeadLayout, order: Sequence[tuple[int, int]]) -> HeadLayout:
    heads, kv_heads = (sum(sizes[k] for sizes in order) for k in (0, 1))
    return HeadLayout(layout.num_heads - heads, layout.num_kv_heads - kv_heads, layout.head_dim, layout.hidden_size)


def _nats(error: Tensor, drift: Tensor, shift: float, tokens: int) -> Tensor:
    """The eliminations' errors hold the ridge term ``shift ||R dW||^2``, which is no loss of the model's."""
    return (error - shift * drift).clamp(min=0) / (2 * tokens)
