"""The cheapest way to meet a budget: one option of every table, chosen by dynamic programming."""

from collections.abc import Hashable, Sequence
from math import gcd, inf

import torch
from torch import Tensor

GRID = 1 << 16  # steps that the budget is divided into at most; finer costs are rounded, so that it is still met


def cheapest(tables: Sequence[Sequence[tuple[int, float]]], need: int) -> list[int]:
    """Choose one option of each table so that they save ``need`` together, at the lowest price in total.

    Exact where the savings have a common divisor of at least ``need / GRID``; else savings are rounded down to such a
    grid and at most ``len(tables)`` steps of it more than needed are saved.

    Args:
        tables: options as (saving, price); a saving may be 0.
        need: what the options have to save at least.

    Returns:
        The index of the chosen option in each table.

    Raises:
        ValueError: when the largest savings do not reach ``need``.
    """
    most = sum(max(saving for saving, _ in table) for table in tables)
    if most < need:
        raise ValueError(f"at most {most:,} can be saved; {need:,} are needed")
    if need <= 0:
        return [min(range(len(table)), key=lambda o: table[o][1]) for table in tables]
    step = max(gcd(*(saving for table in tables for saving, _ in table)), 1)
    if -(-need // step) > GRID:
        step = -(-need // GRID)
    # rounded down, the largest savings may miss the budget by less than a step each
    goal = min(-(-need // step), sum(max(saving // step for saving, _ in table) for table in tables))
    best = torch.full((goal + 1,), inf, dtype=torch.float64)
    best[0] = 0.0  # best[j]: the lowest price of saving at least j steps with the tables so far
    chosen: list[Tensor] = []
    for table in tables:
        after, choice = torch.full_like(best, inf), torch.zeros(goal + 1, dtype=torch.int32)
        for o, (saving, price) in enumerate(table):
            steps = min(saving // step, goal)
            before = torch.cat([best[:1].expand(steps), best[: goal + 1 - steps]])
            better = before + price < after
            after = torch.where(better, before + price, after)
            choice = torch.where(better, o, choice)
        best = after
        chosen.append(choice)
    options, left = [], goal
    for table, choice in zip(reversed(tables), reversed(chosen), strict=True):
        options.append(int(choice[left]))
        left = max(0, left - table[options[-1]][0] // step)
    return options[::-1]


def few_kinds(
    tables: Sequence[Sequence[tuple[int, float]]],
    kinds: Sequence[Sequence[Hashable]],
    need: int,
    picked: list[int],
    most: int,
) -> list[int]:
    """Go on from what ``cheapest`` picked until at most ``most`` kinds of option are in use.

    The kind that is missed least goes, one after the other: not always the best set of kinds, but near it.

    Args:
        tables: as of ``cheapest``; those whose options have kinds come first.
        kinds: of each option of those tables.
        need: as of ``cheapest``.
        picked: one option of each table.
        most: at least 1.

    Raises:
        ValueError: when so few kinds cannot save ``need``.
    """
    while len(used := {of[o] for of, o in zip(kinds, picked, strict=False)}) > most:
        plans = []
        for gone in sorted(used, key=repr):
            left = [[o for o, kind in enumerate(of) if kind in used and kind != gone] for of in kinds]
            left += [list(range(len(table))) for table in tables[len(kinds) :]]
            options = [[table[o] for o in of] for table, of in zip(tables, left, strict=True)]
            if all(left) and sum(max(saving for saving, _ in table) for table in options) >= need:
                plan = [of[o] for of, o in zip(left, cheapest(options, need), strict=True)]
                plans.append((sum(table[o][1] for table, o in zip(tables, plan, strict=True)), plan))
        if not plans:
            raise ValueError(f"{len(used) - 1} kinds of option cannot save {need:,}; {len(used)} can")
        picked = min(plans)[1]
    return picked
