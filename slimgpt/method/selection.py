"""Which units go: batched greedy pruning of heads, dynamic group size for FFN channels.

A selection only orders units and says what each step costs. How many go is a budget's affair (schedule.py), how the
rest is refitted is obs.refit's. Letters as in obs.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd, inf, isfinite

import torch
from torch import Tensor

from slimgpt.method import obs

BREAKDOWN = "too ill-conditioned to compare units: raise percdamp (0.01 suits most models)"


@dataclass(frozen=True)
class HeadLayout:
    """How the columns of ``o_proj`` belong to heads, and heads to kv groups.

    Attributes:
        num_heads: query heads; ``num_heads % num_kv_heads == 0``.
        num_kv_heads: kv heads.
        head_dim: consecutive columns per head.
        hidden_size: width of the residual stream, which gives a head's parameters.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int

    @property
    def parameters(self) -> int:
        """Weights of q, k, v and o."""
        return self.cost(self.num_heads, self.num_kv_heads)

    def cost(self, heads: int, kv_heads: int) -> int:
        """Weights of ``heads`` query heads (rows of q, columns of o) and ``kv_heads`` kv heads (rows of k and v)."""
        return 2 * (heads + kv_heads) * self.head_dim * self.hidden_size

    def columns(self, heads: list[int]) -> Tensor:
        """The columns of o_proj (or rows of q, k, v) that belong to these heads ``[len(heads) * head_dim]``."""
        starts = torch.tensor(heads, dtype=torch.long)[:, None] * self.head_dim
        return (starts + torch.arange(self.head_dim)).flatten()

    def fill(self, budget: float, unit: str, multiple: int) -> tuple[int, int]:
        """Heads and kv heads left when the largest units that fit ``budget`` parameters go, whatever the data say."""
        left = self
        while (choices := [u for u in left.units(unit, multiple) if self.cost(*u) <= budget]) and (
            best := max(choices, key=lambda u: self.cost(*u))
        ):
            budget -= self.cost(*best)
            left = replace(left, num_heads=left.num_heads - best[0], num_kv_heads=left.num_kv_heads - best[1])
        return left.num_heads, left.num_kv_heads

    def smallest_unit(self, unit: str, multiple: int) -> float:
        """Parameters of the smallest unit that may go; infinite where none may."""
        return min((self.cost(*u) for u in self.units(unit, multiple)), default=inf)

    def units(self, unit: str, multiple: int) -> list[tuple[int, int]]:
        """The kinds of unit that may go now, as (query heads, kv heads). One unit of each kind always stays."""
        per_group, units = self.num_heads // self.num_kv_heads, []
        if unit != "query" and self.num_kv_heads > multiple and self.num_kv_heads % multiple == 0:
            units.append((multiple * per_group, multiple))
        take = multiple // gcd(self.num_kv_heads, multiple)
        if unit != "kv_group" and per_group > take:
            units.append((take * self.num_kv_heads, 0))
        return units


@dataclass(frozen=True)
class HeadStep:
    """One removal: these query heads and kv heads of the dense layer go together, at this error."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    parameters: int
    error: float


def remove_heads(
    W_OD: Tensor,
    P_DD: Tensor,
    layout: HeadLayout,
    *,
    unit: str = "auto",
    head_error: str = "exact",
    multiple: int = 1,
    budget: float = inf,
    price: float = inf,
    needed: float = 0,
    name: str = "H",
) -> list[HeadStep]:
    """Batched Greedy Pruning (paper section 3.2): remove the unit with the smallest error, update W and P, repeat.

    A removal depends on the one before, so the CPU waits for a GPU once per step.

    Args:
        W_OD: weight of ``o_proj``; dead columns silenced.
        P_DD: inverse of the damped H of the concatenated head outputs.
        layout: heads and kv groups.
        unit: ``kv_group``, ``query`` (the same number of query heads from every group) or ``auto``, which compares the
            error per parameter removed. With as many kv heads as heads a kv group is a head.
        head_error: ``exact`` or ``paper``.
        multiple: heads and kv heads stay multiples of this.
        budget: parameters that may go; units that no longer fit are not considered. One unit of each kind always stays.
        price: error per parameter that a unit may cost at most, such as what the FFN's parameters cost.
        needed: parameters that must go whatever their price.
        name: what is pruned, for messages.

    Returns:
        The removals in order. Errors are re-computed after each, since heads are not independent.

    Raises:
        ValueError: when H is so ill-conditioned that errors are no numbers any more.
    """
    elimination = obs.Elimination(W_OD, P_DD, capacity=P_DD.shape[0])
    score = elimination.group_errors if head_error == "exact" else elimination.group_errors_paper
    columns_NH = torch.arange(P_DD.shape[0], device=P_DD.device).view(layout.num_heads, layout.head_dim)
    per_group = layout.num_heads // layout.num_kv_heads
    groups = {kv: list(range(kv * per_group, (kv + 1) * per_group)) for kv in range(layout.num_kv_heads)}
    steps: list[HeadStep] = []
    while True:
        alive_GM = torch.tensor(list(groups.values()), device=P_DD.device)
        left = replace(layout, num_heads=alive_GM.numel(), num_kv_heads=len(groups))
        units = [sizes for sizes in left.units(unit, multiple) if layout.cost(*sizes) <= budget]
        cheapest = [_cheapest_unit(alive_GM, *sizes, columns_NH, score) for sizes in units]
        best = None
        for row in torch.cat(cheapest).cpu().split([len(x) for x in cheapest]) if units else ():  # one copy brings all
            error, *chosen = row.tolist()
            if not isfinite(error):
                raise ValueError(f"{name}: {BREAKDOWN}")
            heads = tuple(sorted(map(int, chosen)))
            kv_heads = tuple(kv for kv, members in groups.items() if set(heads).issuperset(members))
            parameters = layout.cost(len(heads), len(kv_heads))
            if needed <= 0 and error > price * parameters:
                continue
            if best is None or error / parameters < best.error / best.parameters:
                best = HeadStep(heads, kv_heads, parameters, error)
        if best is None:
            return steps
        elimination.remove(columns_NH[list(best.heads)].flatten())
        budget -= best.parameters
        needed -= best.parameters
        groups = {
            kv: [h for h in heads if h not in best.heads] for kv, heads in groups.items() if kv not in best.kv_heads
        }
        steps.append(best)


def _cheapest_unit(
    alive_GM: Tensor, heads: int, kv_heads: int, columns_NH: Tensor, score: Callable[[Tensor], Tensor]
) -> Tensor:
    """Error of the cheapest unit of this size, then its query heads: whole numbers are exact as floats."""
    if kv_heads:
        errors_G = score(columns_NH[alive_GM].flatten(1))
        chosen = alive_GM[errors_G.argsort(stable=True)[:kv_heads]].flatten()
    else:
        errors_GM = score(columns_NH[alive_GM.flatten()]).view(alive_GM.shape)
        order_GM = errors_GM.argsort(dim=1, stable=True)[:, : heads // len(alive_GM)]
        chosen = alive_GM.gather(1, order_GM).flatten()
    error = score(columns_NH[chosen].flatten()[None])
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


def remove_channels(
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
        ValueError: when H is so ill-conditioned that errors are no numbers any more.
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
