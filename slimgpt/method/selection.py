"""The order in which units go: heads by batched greedy pruning, FFN channels by dynamic group size.

A path only orders units and says what each step costs. How many go is the allocation's affair (allocation.py), how the
rest is refitted obs.refit's. Letters as in obs.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

import torch
from torch import Tensor

from slimgpt.method import obs
from slimgpt.method.shapes import HeadLayout

BREAKDOWN = "too ill-conditioned to compare units: raise percdamp (0.01 suits most models)"


@dataclass(frozen=True)
class HeadStep:
    """One removal: these query heads and kv heads of the dense layer go together, at this error.

    ``drift`` is ``||W' - W||^2`` of all removals up to this one.
    """

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    parameters: int
    error: float
    drift: float = 0.0


@dataclass(frozen=True)
class HeadPath:
    """Units of heads in the order they go, and the error each step added.

    Attributes:
        layout: of the heads before the first step.
        steps: the removals.
        broken: the errors of what would go next are not numbers: H is too ill-conditioned to go further.
        name: what is pruned, for messages.
    """

    layout: HeadLayout
    steps: tuple[HeadStep, ...]
    broken: bool
    name: str

    def kept(self, count: int) -> tuple[list[int], list[int]]:
        """The heads and kv heads that stay after the first ``count`` steps."""
        gone = {head for step in self.steps[:count] for head in step.heads}
        gone_kv = {kv for step in self.steps[:count] for kv in step.kv_heads}
        heads = [head for head in range(self.layout.num_heads) if head not in gone]
        return heads, [kv for kv in range(self.layout.num_kv_heads) if kv not in gone_kv]


def head_path(
    W_OD: Tensor,
    P_DD: Tensor,
    layout: HeadLayout,
    *,
    unit: str = "auto",
    head_error: str = "exact",
    multiple: int = 1,
    limit: float = inf,
    order: Sequence[tuple[int, int]] | None = None,
    name: str = "H",
) -> HeadPath:
    """Batched Greedy Pruning (paper section 3.2): remove the unit with the smallest error, update W and P, repeat.

    A removal depends on the one before, so the CPU waits for a GPU once per step.

    Args:
        W_OD: weight of ``o_proj``; dead columns silenced.
        P_DD: inverse of the damped H of the concatenated head outputs.
        layout: heads and kv groups.
        unit: ``kv_group``, ``query`` (the same number of query heads from every group) or ``auto``, which compares the
            error per parameter removed. With as many kv heads as heads a kv group is a head.
        head_error: ``exact``; ``paper`` (its eq. 5); or ``diagonal``, its ablation without grouped Cholesky: a head's
            columns as if each went alone, by the diagonal of P before any of them goes (the "initial" one).
            Earlier steps count, as with the other two: W and P are updated after each.
        multiple: heads and kv heads stay multiples of this.
        limit: parameters that may go; units that no longer fit are not considered. One unit of each kind always stays.
        order: the kinds of unit that go one after the other, as (query heads, kv heads), instead of the cheapest kind.
        name: what is pruned, for messages.

    Returns:
        The removals in order, as far as the limit allows. Errors are re-computed after each, since heads are not
        independent.
    """
    elimination = obs.Elimination(W_OD, P_DD, capacity=P_DD.shape[0])
    score = {
        "exact": elimination.group_errors,
        "paper": elimination.group_errors_paper,
        "diagonal": elimination.group_errors_diagonal,
    }[head_error]
    columns_NH = torch.arange(P_DD.shape[0], device=P_DD.device).view(layout.num_heads, layout.head_dim)
    per_group = layout.num_heads // layout.num_kv_heads
    groups = {kv: list(range(kv * per_group, (kv + 1) * per_group)) for kv in range(layout.num_kv_heads)}
    steps: list[HeadStep] = []
    while True:
        alive_GM = torch.tensor(list(groups.values()), device=P_DD.device)
        left = replace(layout, num_heads=alive_GM.numel(), num_kv_heads=len(groups))
        units = [sizes for sizes in left.units(unit, multiple) if layout.cost(*sizes) <= limit]
        if order is not None:
            units = list(order[len(steps) : len(steps) + 1])
        if not units:
            return HeadPath(layout, tuple(steps), broken=False, name=name)
        cheapest = [_cheapest_unit(alive_GM, *sizes, columns_NH, score) for sizes in units]
        choices = []
        for row in torch.cat(cheapest).cpu().split([len(x) for x in cheapest]):  # one copy brings all
            error, *chosen = row.tolist()
            if not isfinite(error):
                return HeadPath(layout, tuple(steps), broken=True, name=name)
            heads = tuple(sorted(map(int, chosen)))
            kv_heads = tuple(kv for kv, members in groups.items() if set(heads).issuperset(members))
            choices.append(HeadStep(heads, kv_heads, layout.cost(len(heads), len(kv_heads)), error))
        best = min(choices, key=lambda step: step.error / step.parameters)
        elimination.remove(columns_NH[list(best.heads)].flatten())
        best = replace(best, drift=float((elimination.W_OD - W_OD).square().sum()))
        if not isfinite(best.drift):  # a score by the diagonal alone cannot tell before
            return HeadPath(layout, tuple(steps), broken=True, name=name)
        limit -= best.parameters
        groups = {
            kv: [h for h in heads if h not in best.heads] for kv, heads in groups.items() if kv not in best.kv_heads
        }
        steps.append(best)


def _cheapest_unit(
    alive_GM: Tensor, heads: int, kv_heads: int, columns_NH: Tensor, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Error of the cheapest unit of this size, then its query heads: integers are exact as floats.

    The error is not a number where that of any head or group is not: it cannot be said which is the cheapest.
    """
    if kv_heads:
        errors = score(columns_NH[alive_GM].flatten(1))
        chosen = alive_GM[errors.argsort(stable=True)[:kv_heads]].flatten()
    else:
        errors = score(columns_NH[alive_GM.flatten()])
        order_GM = errors.view(alive_GM.shape).argsort(dim=1, stable=True)[:, : heads // len(alive_GM)]
        chosen = alive_GM.gather(1, order_GM).flatten()
    error = score(columns_NH[chosen].flatten()[None]).masked_fill(~errors.isfinite().all(), torch.nan)
    return torch.cat([error, chosen.to(error.dtype)])


@dataclass(frozen=True)
class ChannelPath:
    """Channels in the order they go, ``[R]``, and the error each step added."""

    order: Tensor
    step_sizes: list[int]
    step_errors: list[float]

    def marginal_error(self, channels: int = 64) -> float:
        """Error per channel of the last removals, at least ``channels`` of them: what going further would cost."""
        count, error = 0, 0.0
        for size, step_error in zip(reversed(self.step_sizes), reversed(self.step_errors), strict=True):
            count, error = count + size, error + step_error
            if count >= channels:
                break
        return error / max(count, 1)


def channel_path(
    W_OD: Tensor,
    P_DD: Tensor,
    count: int,
    *,
    group_size_max: int = 1024,
    group_size_min: int = 8,
    name: str = "H",
) -> ChannelPath:
    """Dynamic Group Size (paper section 3.3): remove the ``g`` columns with the smallest ``e_j`` together, repeat.

    The CPU waits for a GPU once, at the end.

    Args:
        W_OD: weight of ``down_proj``; dead columns silenced.
        P_DD: inverse of the damped H of the channel activations.
        count: channels to remove.
        group_size_max: channels per step while the target is far.
        group_size_min: channels per step at the end.
        name: what is pruned, for messages.

    Raises:
        ValueError: when H is so ill-conditioned that errors are not numbers any more.
    """
    elimination = obs.Elimination(W_OD, P_DD, capacity=count)
    order: list[Tensor] = []
    errors: list[Tensor] = []
    left = count
    while left > 0:
        size = group_size(left, group_size_max, group_size_min)
        gone_S = elimination.column_errors().argsort(stable=True)[:size]
        # the last update would be thrown away: refit starts from the original W
        errors.append(elimination.remove(gone_S) if left > size else elimination.group_errors(gone_S[None])[0])
        order.append(gone_S)
        left -= size
    step_errors = torch.stack(errors).tolist() if errors else []
    if not all(map(isfinite, step_errors)):
        raise ValueError(f"{name}: {BREAKDOWN}")
    gone_R = torch.cat(order) if order else torch.empty(0, dtype=torch.long, device=W_OD.device)
    return ChannelPath(gone_R, [len(gone) for gone in order], step_errors)


def group_size(left: int, largest: int, smallest: int) -> int:
    """``largest``, halved until it is at most half of what is left, but never under ``smallest``."""
    size = largest
    while size > smallest and 2 * size > left:
        size //= 2
    return min(max(size, smallest), left)
