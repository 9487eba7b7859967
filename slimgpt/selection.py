"""Which units go: batched greedy pruning of heads, dynamic group size for FFN channels.

A selection only orders units and says what each step costs. How many go is a budget's affair (schedule.py), how the
rest is refitted is obs.refit's. Letters as in obs.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import gcd, inf

import torch
from torch import Tensor

from . import obs


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
        while (choices := [u for u in left._units(unit, multiple) if self.cost(*u) <= budget]) and (
            best := max(choices, key=lambda u: self.cost(*u))
        ):
            budget -= self.cost(*best)
            left = replace(left, num_heads=left.num_heads - best[0], num_kv_heads=left.num_kv_heads - best[1])
        return left.num_heads, left.num_kv_heads

    def smallest_unit(self, unit: str, multiple: int) -> float:
        """Parameters of the smallest unit that may go; infinite where none may."""
        return min((self.cost(*u) for u in self._units(unit, multiple)), default=inf)

    def _units(self, unit: str, multiple: int) -> list[tuple[int, int]]:
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
    damped: obs.Damped,
    layout: HeadLayout,
    *,
    unit: str = "auto",
    head_error: str = "exact",
    multiple: int = 1,
    budget: float = inf,
    price: float = inf,
    needed: float = 0,
) -> list[HeadStep]:
    """Batched Greedy Pruning (paper section 3.2): remove the unit with the smallest error, update W and P, repeat.

    Args:
        W_OD: weight of ``o_proj``; dead columns silenced.
        damped: H of the concatenated head outputs.
        layout: heads and kv groups.
        unit: ``kv_group``, ``query`` (the same number of query heads from every group) or ``auto``, which compares the
            error per parameter removed. With as many kv heads as heads a kv group is a head.
        head_error: ``exact`` or ``paper``.
        multiple: heads and kv heads stay multiples of this.
        budget: parameters that may go; units that no longer fit are not considered. One unit of each kind always stays.
        price: error per parameter that a unit may cost at most, such as what the FFN's parameters cost.
        needed: parameters that must go whatever their price.

    Returns:
        The removals in order. Errors are re-computed after each, since heads are not independent.
    """
    score = obs.group_errors if head_error == "exact" else obs.group_errors_paper
    P_DD = damped.inverse()
    per_group = layout.num_heads // layout.num_kv_heads
    groups = {kv: list(range(kv * per_group, (kv + 1) * per_group)) for kv in range(layout.num_kv_heads)}
    steps: list[HeadStep] = []
    while True:
        alive = [h for heads in groups.values() for h in heads]
        errors_of = _Scorer(score, W_OD, P_DD, layout, {h: i for i, h in enumerate(alive)})
        best = None
        for heads, kv_heads in _candidates(groups, unit, multiple, errors_of):
            parameters = layout.cost(len(heads), len(kv_heads))
            if parameters > budget:
                continue
            error = float(errors_of([heads])[0])
            if needed <= 0 and error > price * parameters:
                continue
            if best is None or error / parameters < best.error / best.parameters:
                best = HeadStep(tuple(sorted(heads)), tuple(sorted(kv_heads)), parameters, error)
        if best is None:
            return steps
        gone = errors_of.columns(list(best.heads))
        mask = torch.ones(P_DD.shape[0], dtype=torch.bool, device=P_DD.device)
        mask[gone] = False
        W_OD, P_DD = obs.eliminate(W_OD, P_DD, gone, mask.nonzero().flatten())
        budget -= best.parameters
        needed -= best.parameters
        groups = {
            kv: [h for h in heads if h not in best.heads] for kv, heads in groups.items() if kv not in best.kv_heads
        }
        steps.append(best)


@dataclass(frozen=True)
class _Scorer:
    """Errors of removing sets of heads, while W and P hold only the columns of the living heads."""

    score: Callable[[Tensor, Tensor, Tensor], Tensor]
    W_OD: Tensor
    P_DD: Tensor
    layout: HeadLayout
    place: dict[int, int]

    def columns(self, heads: list[int]) -> Tensor:
        return self.layout.columns([self.place[h] for h in heads]).to(self.W_OD.device)

    def __call__(self, sets: list[list[int]]) -> Tensor:
        return self.score(self.W_OD, self.P_DD, torch.stack([self.columns(heads) for heads in sets]))


def _candidates(
    groups: dict[int, list[int]], unit: str, multiple: int, errors_of: _Scorer
) -> Iterator[tuple[list[int], list[int]]]:
    """The cheapest unit of each kind that is allowed now, as (query heads, kv heads)."""
    per_group = len(next(iter(groups.values())))
    if unit != "query" and len(groups) > multiple and len(groups) % multiple == 0:
        names = list(groups)
        errors = errors_of([groups[kv] for kv in names])
        cheapest = [names[i] for i in errors.argsort(stable=True)[:multiple].tolist()]
        yield [h for kv in cheapest for h in groups[kv]], cheapest
    take = multiple // gcd(len(groups), multiple)
    if unit != "kv_group" and per_group > take:
        errors = errors_of([[h] for heads in groups.values() for h in heads]).view(len(groups), per_group)
        order = errors.argsort(dim=1, stable=True)[:, :take].tolist()
        yield [heads[i] for heads, row in zip(groups.values(), order, strict=True) for i in row], []


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
    W_OD: Tensor, damped: obs.Damped, count: int, *, group_size_max: int = 1024, group_size_min: int = 8
) -> ChannelPath:
    """Dynamic Group Size (paper section 3.3): remove the ``g`` columns with the smallest ``e_j`` together, repeat.

    Args:
        W_OD: weight of ``down_proj``; dead columns silenced.
        damped: H of the channel activations.
        count: channels to remove.
        group_size_max: channels per step while the target is far.
        group_size_min: channels per step at the end.
    """
    P_DD = damped.inverse()
    alive_D = torch.arange(W_OD.shape[1], device=W_OD.device)
    order: list[Tensor] = []
    sizes: list[int] = []
    errors: list[float] = []
    left = count
    while left > 0:
        size = group_size(left, group_size_max, group_size_min)
        ranking_D = obs.column_errors(W_OD, P_DD).argsort(stable=True)
        gone_S, rest_K = ranking_D[:size], ranking_D[size:].sort().values
        errors.append(float(obs.group_errors(W_OD, P_DD, gone_S[None])[0]))
        order.append(alive_D[gone_S])
        sizes.append(size)
        if left > size:  # the last update would be thrown away: refit starts from the original W
            W_OD, P_DD = obs.eliminate(W_OD, P_DD, gone_S, rest_K)
        alive_D = alive_D[rest_K]
        left -= size
    return ChannelPath(torch.cat(order) if order else alive_D[:0], sizes, errors)


def group_size(left: int, largest: int, smallest: int) -> int:
    """``largest``, halved until it is at most half of what is left, but never under ``smallest``."""
    size = largest
    while size > smallest and 2 * size > left:
        size //= 2
    return min(max(size, smallest), left)
