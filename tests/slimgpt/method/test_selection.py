"""Greedy selection against brute force: at every step, try every allowed unit and refit."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgpt.method import obs
from slimgpt.method.selection import ChannelPath, channel_path, group_size, head_path
from slimgpt.method.shapes import HeadLayout

from .test_obs import damped, least_squares_error


def head_problem(seed: int, layout: HeadLayout):
    generator = torch.Generator().manual_seed(seed)
    dim = layout.num_heads * layout.head_dim
    x_TD = torch.randn(3 * dim, dim, generator=generator, dtype=torch.float64) @ torch.randn(
        dim, dim, generator=generator, dtype=torch.float64
    )
    W_OD = torch.randn(layout.hidden_size, dim, generator=generator, dtype=torch.float64)
    return W_OD, *damped(x_TD.T @ x_TD)


def loss_without(W_OD, H_DD, layout, removed_heads: set[int]):
    kept_K = layout.columns([h for h in range(layout.num_heads) if h not in removed_heads])
    return float(least_squares_error(W_OD, H_DD, kept_K)[0])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_heads_of_multi_head_attention_are_removed_in_brute_force_order(seed):
    layout = HeadLayout(num_heads=5, num_kv_heads=5, head_dim=2, hidden_size=6)
    W_OD, H_DD, P_DD = head_problem(seed, layout)
    removed_heads: set[int] = set()
    loss = 0.0
    for step in head_path(W_OD, P_DD, layout).steps:
        losses = {h: loss_without(W_OD, H_DD, layout, removed_heads | {h}) for h in range(5) if h not in removed_heads}
        best = min(losses, key=losses.__getitem__)
        assert step.heads == step.kv_heads == (best,)
        assert step.error == pytest.approx(losses[best] - loss, rel=1e-6)
        removed_heads.add(best)
        loss = losses[best]
    assert len(removed_heads) == 4  # the last head always stays


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), unit=st.sampled_from(["kv_group", "query", "auto"]))
def test_grouped_query_units_are_removed_in_brute_force_order(seed, unit):
    """kv_group: exact, over all groups. query: the cheapest head of each group. auto: the cheaper per parameter."""
    layout = HeadLayout(num_heads=6, num_kv_heads=2, head_dim=2, hidden_size=6)
    W_OD, H_DD, P_DD = head_problem(seed, layout)
    groups = {0: [0, 1, 2], 1: [3, 4, 5]}
    removed_heads: set[int] = set()
    loss = 0.0
    for step in head_path(W_OD, P_DD, layout, unit=unit).steps:
        choices = {}
        if unit != "query" and len(groups) > 1:
            for kv, heads in groups.items():
                choices[tuple(heads), (kv,)] = loss_without(W_OD, H_DD, layout, removed_heads | set(heads)) - loss
        if unit != "kv_group" and len(next(iter(groups.values()))) > 1:
            single = {
                h: loss_without(W_OD, H_DD, layout, removed_heads | {h}) for heads in groups.values() for h in heads
            }
            pick = tuple(min(heads, key=single.__getitem__) for heads in groups.values())
            choices[pick, ()] = loss_without(W_OD, H_DD, layout, removed_heads | set(pick)) - loss
        heads, kv_heads = min(choices, key=lambda c: choices[c] / layout.cost(len(c[0]), len(c[1])))
        assert (step.heads, step.kv_heads) == (tuple(sorted(heads)), kv_heads)
        assert step.error == pytest.approx(choices[heads, kv_heads], rel=1e-6)
        loss += choices[heads, kv_heads]
        removed_heads |= set(heads)
        groups = {kv: [h for h in hs if h not in removed_heads] for kv, hs in groups.items() if kv not in kv_heads}
        assert len({len(hs) for hs in groups.values()}) == 1  # num_heads % num_kv_heads == 0 holds at every step
    assert len(groups) >= 1
    assert all(groups.values())


@pytest.mark.parametrize(("unit", "multiple"), list(product(["kv_group", "query", "auto"], [1, 2, 4])))
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (12, 4)])
def test_multiples_and_divisibility_hold_at_every_step(unit, multiple, heads, kv_heads):
    layout = HeadLayout(heads, kv_heads, head_dim=2, hidden_size=8)
    W_OD, _, P_DD = head_problem(0, layout)
    left, left_kv = heads, kv_heads
    for step in head_path(W_OD, P_DD, layout, unit=unit, multiple=multiple).steps:
        left, left_kv = left - len(step.heads), left_kv - len(step.kv_heads)
        assert left > 0
        assert left_kv > 0
        assert left % left_kv == 0
        assert left % multiple == 0
        assert left_kv == kv_heads or left_kv % multiple == 0


def test_the_limit_is_never_exceeded_and_units_that_do_not_fit_are_kept():
    layout = HeadLayout(num_heads=6, num_kv_heads=2, head_dim=2, hidden_size=6)
    W_OD, _, P_DD = head_problem(4, layout)
    group, query = layout.cost(3, 1), layout.cost(2, 0)

    def removed(limit, unit="auto"):
        return [step.parameters for step in head_path(W_OD, P_DD, layout, unit=unit, limit=limit).steps]

    assert removed(query - 1) == []
    assert removed(query) == [query]
    assert removed(group, "kv_group") == [group]


def test_the_kept_heads_are_all_except_those_of_the_steps():
    layout = HeadLayout(num_heads=6, num_kv_heads=3, head_dim=2, hidden_size=6)
    W_OD, _, P_DD = head_problem(6, layout)
    path = head_path(W_OD, P_DD, layout)
    assert path.kept(0) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])
    for count in range(1, len(path.steps) + 1):
        removed_steps = path.steps[:count]
        heads, kv_heads = path.kept(count)
        assert sorted([*heads, *(h for step in removed_steps for h in step.heads)]) == list(range(6))
        assert sorted([*kv_heads, *(kv for step in removed_steps for kv in step.kv_heads)]) == list(range(3))


def test_a_path_ends_where_errors_are_nan_and_is_marked_broken():
    layout = HeadLayout(num_heads=4, num_kv_heads=4, head_dim=2, hidden_size=6)
    W_OD, _, P_DD = head_problem(5, layout)
    path = head_path(W_OD, P_DD, layout)
    assert (len(path.steps), path.broken) == (3, False)
    P_DD[6:, 6:] = -1  # of the last head: not positive definite
    path = head_path(W_OD, P_DD, layout)
    assert (path.steps, path.broken) == ((), True)


def test_the_marginal_error_is_that_of_the_last_channels():
    path = ChannelPath(torch.arange(112), [64, 32, 16], [1.0, 2.0, 4.0])
    assert path.marginal_error(16) == 4 / 16
    assert path.marginal_error(17) == 6 / 48
    assert path.marginal_error(1000) == 7 / 112


def test_the_papers_score_is_used_on_request():
    """In some random cases the two scores disagree on the cheapest head; both cases must occur."""
    layout = HeadLayout(num_heads=4, num_kv_heads=4, head_dim=4, hidden_size=6)
    firsts = []
    for seed in range(20):
        W_OD, _, P_DD = head_problem(seed, layout)
        firsts.append(tuple(head_path(W_OD, P_DD, layout, head_error=e).steps[0].heads for e in ("exact", "paper")))
        scores = obs.Elimination(W_OD, P_DD, 0).group_errors_paper(torch.arange(16).view(4, 4))
        assert firsts[-1][1] == (int(scores.argmin()),)
    assert any(a != b for a, b in firsts)


@pytest.mark.parametrize("unit", ["kv_group", "query", "auto"])
def test_the_diagonal_score_is_the_sum_of_column_errors_in_the_problem_that_is_left(unit):
    """Oracle: before each step, the optimum and the inverse of H on the columns left, both made anew."""
    layout = HeadLayout(num_heads=6, num_kv_heads=3, head_dim=2, hidden_size=5)
    for seed in range(5):
        W_OD, H_DD, P_DD = head_problem(seed, layout)
        left = list(range(6))
        for step in head_path(W_OD, P_DD, layout, unit=unit, head_error="diagonal").steps:
            kept_K = layout.columns(left)
            inverse_KK = torch.linalg.inv(H_DD[kept_K][:, kept_K])
            _, W_OK = least_squares_error(W_OD, H_DD, kept_K)
            errors = (W_OK.square().sum(dim=0) / inverse_KK.diagonal()).view(-1, 2).sum(dim=1)
            by_head = dict(zip(left, errors.tolist(), strict=True))
            assert step.error == pytest.approx(sum(by_head[head] for head in step.heads), rel=1e-6)
            if unit == "kv_group":
                pairs = {(h, h + 1): by_head[h] + by_head[h + 1] for h in left[::2]}
                assert step.heads == min(pairs, key=pairs.__getitem__)
            left = [head for head in left if head not in step.heads]


def test_the_diagonal_score_falls_for_a_head_whose_columns_only_replace_each_other():
    """Head 0: the same signal twice, which neither column alone is needed for. Head 1: two weaker, unrelated ones."""
    layout = HeadLayout(num_heads=2, num_kv_heads=2, head_dim=2, hidden_size=2)
    H_DD = torch.diag(torch.tensor([1.0, 1.0, 0.2, 0.2], dtype=torch.float64))
    H_DD[0, 1] = H_DD[1, 0] = 0.999
    W_OD, P_DD = torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.float64), torch.linalg.inv(H_DD)
    exact, diagonal = (head_path(W_OD, P_DD, layout, head_error=e).steps[0] for e in ("exact", "diagonal"))
    assert (exact.heads, diagonal.heads) == ((1,), (0,))
    assert exact.error == pytest.approx(0.2 + 0.2)
    assert diagonal.error == pytest.approx(2 * (1 - 0.999**2))
    assert loss_without(W_OD, H_DD, layout, {0}) == pytest.approx(2 + 2 * 0.999)  # what it really costs


@pytest.mark.parametrize(("corner", "steps"), [([[-1, -1], [-1, -1]], 0), ([[1, 2], [2, 1]], 2)])
def test_a_path_by_the_diagonal_score_ends_before_a_head_that_cannot_be_removed(corner, steps):
    """An indefinite block of P shows at the removal alone: no step is made of it."""
    layout = HeadLayout(num_heads=4, num_kv_heads=4, head_dim=2, hidden_size=6)
    W_OD, P_DD = torch.ones(6, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    W_OD[:, 2:4] = 3
    P_DD[6:, 6:] = torch.tensor(corner)
    W_OD[:, 6:] = 2
    path = head_path(W_OD, P_DD, layout, head_error="diagonal")
    assert (len(path.steps), path.broken) == (steps, True)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 7))
def test_group_size_one_is_greedy_removal(seed, count):
    layout = HeadLayout(num_heads=8, num_kv_heads=8, head_dim=1, hidden_size=5)
    W_OD, _, P_DD = head_problem(seed, layout)
    path = channel_path(W_OD, P_DD, count, group_size_max=1, group_size_min=1)
    expected = head_path(W_OD, P_DD, layout).steps[:count]
    assert path.order.tolist() == [step.heads[0] for step in expected]
    assert path.step_errors == pytest.approx([step.error for step in expected], rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 60), largest=st.sampled_from([1, 4, 16, 1024]), smallest=st.sampled_from([1, 4, 8]))
def test_exactly_the_requested_number_of_channels_is_removed(count, largest, smallest):
    layout = HeadLayout(num_heads=64, num_kv_heads=64, head_dim=1, hidden_size=4)
    W_OD, _, P_DD = head_problem(1, layout)
    path = channel_path(W_OD, P_DD, count, group_size_max=largest, group_size_min=smallest)
    assert len(set(path.order.tolist())) == len(path.order) == count == sum(path.step_sizes)


def test_errors_of_the_steps_add_up_to_the_total_loss():
    layout = HeadLayout(num_heads=32, num_kv_heads=32, head_dim=1, hidden_size=6)
    W_OD, H_DD, P_DD = head_problem(7, layout)
    path = channel_path(W_OD, P_DD, 20, group_size_max=8, group_size_min=2)
    assert sum(path.step_errors) == pytest.approx(loss_without(W_OD, H_DD, layout, set(path.order.tolist())), rel=1e-6)


def test_dead_columns_are_removed_first_without_error():
    layout = HeadLayout(num_heads=8, num_kv_heads=8, head_dim=1, hidden_size=5)
    W_OD, H_DD, _ = head_problem(2, layout)
    H_DD[[1, 6]] = 0
    H_DD[:, [1, 6]] = 0
    path = channel_path(obs.silence_dead_columns(W_OD * 100, H_DD), obs.invert(H_DD, 0.01).P_DD, 3, group_size_min=1)
    assert set(path.order[:2].tolist()) == {1, 6}
    assert path.step_errors[0] == 0


def test_group_size_halves_towards_the_target():
    left, sizes = 3000, []
    while left:
        sizes.append(group_size(left, 1024, 8))
        left -= sizes[-1]
    assert sizes[:2] == [1024, 512]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 8
