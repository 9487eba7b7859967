"""The knapsack against brute force: every combination of options."""

import itertools
import math
import random

import pytest

from slimgpt.method import knapsack
from slimgpt.method.knapsack import cheapest, few_kinds


def brute_force(tables, need):
    combinations = itertools.product(*tables)
    return min((sum(p for _, p in x) for x in combinations if sum(s for s, _ in x) >= need), default=math.inf)


def random_tables(rng, options):
    return [[(0, 0.0), *((rng.randint(1, 9) * 12, rng.random()) for _ in range(options()))] for _ in range(5)]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_combination_meets_the_budget_for_less(seed):
    rng = random.Random(seed)
    tables = random_tables(rng, lambda: rng.randint(1, 4))
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


@pytest.mark.parametrize("seed", range(20))
def test_a_limit_of_kinds_is_kept_and_costs_little_more_than_the_best_such_choice(seed):
    rng = random.Random(seed)
    tables = random_tables(rng, lambda: 3)
    kinds = [[0, *rng.sample(range(1, 6), 3)] for _ in range(4)]  # the last table has none
    need, most = sum(max(saving for saving, _ in table) for table in tables) // 2, 2

    def restricted(few):
        left = [
            [x for x, k in zip(table, of, strict=True) if k in few] for table, of in zip(tables, kinds, strict=False)
        ]
        return [*left, tables[-1]]

    best = min(brute_force(restricted(few), need) for few in itertools.combinations(range(6), most))
    picked = few_kinds(tables, kinds, need, cheapest(tables, need), most)
    assert sum(table[o][0] for table, o in zip(tables, picked, strict=True)) >= need
    assert len({of[o] for of, o in zip(kinds, picked, strict=False)}) <= most
    assert best - 1e-9 <= sum(table[o][1] for table, o in zip(tables, picked, strict=True)) <= 1.5 * best


def test_too_few_kinds_for_the_budget_are_refused():
    tables = [[(0, 0.0), (5, 1.0)], [(0, 0.0), (7, 2.0)]]
    with pytest.raises(ValueError, match="1 kinds of option cannot save 12; 2 can"):
        few_kinds(tables, [["dense", "a"], ["dense", "b"]], 12, [1, 1], 1)
