"""The knapsack against brute force: every combination of options."""

import itertools
import random

import pytest

from slimgpt.method import knapsack
from slimgpt.method.knapsack import cheapest


def brute_force(tables, need):
    combinations = itertools.product(*tables)
    return min(sum(p for _, p in chosen) for chosen in combinations if sum(s for s, _ in chosen) >= need)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_combination_meets_the_budget_for_less(seed):
    rng = random.Random(seed)
    tables = [[(0, 0.0), *((rng.randint(1, 9) * 12, rng.random()) for _ in range(rng.randint(1, 4)))] for _ in range(5)]
    most = sum(max(saving for saving, _ in table) for table in tables)
    need = rng.randint(1, most)
    chosen = [table[o] for table, o in zip(tables, cheapest(tables, need), strict=True)]
    assert sum(saving for saving, _ in chosen) >= need
    assert sum(price for _, price in chosen) == pytest.approx(brute_force(tables, need))


def test_where_costs_are_finer_than_the_grid_the_budget_is_still_met(monkeypatch):
    monkeypatch.setattr(knapsack, "GRID", 50)
    rng = random.Random(0)
    tables = [[(0, 0.0), *((rng.randint(1, 10_000), rng.random()) for _ in range(3))] for _ in range(6)]
    need = sum(max(saving for saving, _ in table) for table in tables) // 2
    chosen = [table[o] for table, o in zip(tables, cheapest(tables, need), strict=True)]
    assert need <= sum(saving for saving, _ in chosen)
    assert sum(price for _, price in chosen) <= 1.2 * brute_force(tables, need)


def test_nothing_needed_costs_nothing_and_too_much_is_refused():
    tables = [[(0, 0.0), (5, 1.0)], [(0, 0.0), (7, 2.0)]]
    assert cheapest(tables, 0) == [0, 0]
    with pytest.raises(ValueError, match="at most 12 can be saved; 13 are needed"):
        cheapest(tables, 13)
