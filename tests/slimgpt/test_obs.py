"""The formulas of obs.py against plain least squares and brute force, in float64."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgpt import obs

CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def problem(seed: int, out: int = 5, dim: int = 8, tokens: int = 40, rank: int | None = None):
    """A random W [O, D] and damped H of random activations [T, D]."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    if rank is not None:
        x_TD = x_TD[:, :rank] @ torch.randn(rank, dim, generator=generator, dtype=torch.float64)
    W_OD = torch.randn(out, dim, generator=generator, dtype=torch.float64)
    return W_OD, obs.damp(x_TD.T @ x_TD, 0.01)


def least_squares_error(W_OD, H_DD, kept_K):
    """``min ||WX - W'X||^2`` over W' on the kept columns, by the normal equations of the definition."""
    W_OK = torch.linalg.solve(H_DD[kept_K][:, kept_K], (W_OD @ H_DD[:, kept_K]).T).T
    gap_OD = W_OD.clone()
    gap_OD[:, kept_K] -= W_OK
    return ((gap_OD @ H_DD) * gap_OD).sum(), W_OK


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.integers(3, 12), tokens=st.integers(2, 60), data=st.data())
def test_group_error_is_the_increase_of_the_loss_after_optimal_refit(seed, dim, tokens, data):
    W_OD, damped = problem(seed, dim=dim, tokens=tokens)
    gone = data.draw(st.lists(st.integers(0, dim - 1), min_size=1, max_size=dim - 1, unique=True))
    kept_K = torch.tensor([j for j in range(dim) if j not in gone])
    error = obs.group_errors(W_OD, damped.inverse(), torch.tensor([gone]))[0]
    expected, _ = least_squares_error(W_OD, damped.H_DD, kept_K)
    torch.testing.assert_close(error, expected, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.integers(4, 12), cut=st.integers(1, 3))
def test_eliminating_in_any_grouping_ends_at_the_least_squares_optimum(seed, dim, cut):
    W_OD, damped = problem(seed, dim=dim)
    alive_D, W, P = torch.arange(dim), W_OD, damped.inverse()
    while len(alive_D) > cut + 1:
        gone_S, rest_K = torch.arange(cut), torch.arange(cut, len(alive_D))
        W, P = obs.eliminate(W, P, gone_S, rest_K)
        alive_D = alive_D[rest_K]
    _, expected = least_squares_error(W_OD, damped.H_DD, alive_D)
    torch.testing.assert_close(W, expected, **CLOSE)
    torch.testing.assert_close(P, torch.linalg.inv(damped.H_DD[alive_D][:, alive_D]), **CLOSE)
    torch.testing.assert_close(obs.refit(W_OD, damped.H_DD, alive_D), expected, **CLOSE)


def test_single_columns_agree_in_all_three_scores():
    W_OD, damped = problem(1)
    P_DD, singles = damped.inverse(), torch.arange(8)[:, None]
    torch.testing.assert_close(obs.column_errors(W_OD, P_DD), obs.group_errors(W_OD, P_DD, singles))
    torch.testing.assert_close(obs.column_errors(W_OD, P_DD), obs.group_errors_paper(W_OD, P_DD, singles))


def test_the_papers_head_score_follows_its_equation():
    W_OD, damped = problem(2)
    P_DD, columns = damped.inverse(), torch.tensor([[0, 1, 2], [5, 6, 7]])
    for got, S in zip(obs.group_errors_paper(W_OD, P_DD, columns), columns, strict=True):
        L_SS = torch.linalg.cholesky(P_DD[S][:, S])
        expected = sum(W_OD[:, j].square().sum() / L_SS[k, k] ** 2 for k, j in enumerate(S))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dim", [7, 128, 300, 800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_the_sum_of_outer_products_whatever_the_strips(dim, dtype):
    gram, x = obs.Gram(dim, "cpu"), torch.randn(2, 3, 50, dim).to(dtype)
    for block in x:
        gram.add(block)
    flat_TD = x.reshape(-1, dim).double()
    torch.testing.assert_close(gram.finish(), flat_TD.T @ flat_TD, rtol=1e-4, atol=1e-3)
    assert gram.tokens == 300


def test_gram_refuses_nan():
    gram = obs.Gram(4, "cpu")
    gram.add(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        gram.finish()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 6),
    scale=st.sampled_from([1e-20, 1e-4, 1.0, 1e4]),
    percdamp=st.sampled_from([0.0, 0.01]),
)
def test_ill_conditioned_statistics_never_give_nan(seed, tokens, scale, percdamp):
    """Fewer tokens than columns, duplicate and dead columns, an outlier of 1e4: damping grows until it works."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 8, generator=generator, dtype=torch.float64) * scale
    x_TD[:, 3], x_TD[:, 5] = x_TD[:, 2], 0
    x_TD[:, 6] *= 1e4
    W_OD = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    damped = obs.damp(x_TD.T @ x_TD, percdamp)
    assert damped.damping >= percdamp
    assert bool(torch.isfinite(obs.column_errors(W_OD, damped.inverse())).all())
    assert bool(torch.isfinite(obs.refit(W_OD, damped.H_DD, torch.tensor([0, 1, 4]))).all())


def test_raised_damping_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        damped = obs.damp(torch.ones(3, 3, dtype=torch.float64), 0.0)
    assert damped.damping > 0
    assert "damping raised from 0" in caplog.text


def test_an_indefinite_matrix_is_refused_not_replaced():
    with pytest.raises(ValueError, match="stays indefinite"):
        obs.damp(torch.diag(torch.tensor([1.0, 1.0, -1e9], dtype=torch.float64)), 0.01)


def test_relative_error_from_h_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(3)
    x_TD = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    W_OD = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    kept_K, W_OK = torch.tensor([0, 2, 3]), torch.randn(4, 3, generator=generator, dtype=torch.float64)
    expected = (x_TD @ W_OD.T - x_TD[:, kept_K] @ W_OK.T).square().sum() / (x_TD @ W_OD.T).square().sum()
    assert obs.relative_error(W_OD, W_OK, x_TD.T @ x_TD, kept_K) == pytest.approx(float(expected))
