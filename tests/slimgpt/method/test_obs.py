"""The formulas of obs.py against plain least squares and brute force, in float64."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from slimgpt.method import obs

CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def problem(seed: int, out: int = 5, dim: int = 8, tokens: int = 40, rank: int | None = None):
    """A random W [O, D], the damped H of random activations [T, D], and its inverse by invert()."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    if rank is not None:
        x_TD = x_TD[:, :rank] @ torch.randn(rank, dim, generator=generator, dtype=torch.float64)
    W_OD = torch.randn(out, dim, generator=generator, dtype=torch.float64)
    return W_OD, *damped(x_TD.T @ x_TD)


def damped(H_DD, percdamp: float = 0.01):
    """H with the shift of invert() on its diagonal, and the inverse."""
    inverse = obs.invert(H_DD, percdamp)
    return H_DD + inverse.shift * torch.eye(len(H_DD), dtype=H_DD.dtype), inverse.P_DD


def least_squares_error(W_OD, H_DD, kept_K):
    """``min ||WX - W'X||^2`` over W' on the kept columns, by the normal equations of the definition."""
    W_OK = torch.linalg.solve(H_DD[kept_K][:, kept_K], (W_OD @ H_DD[:, kept_K]).T).T
    gap_OD = W_OD.clone()
    gap_OD[:, kept_K] -= W_OK
    return ((gap_OD @ H_DD) * gap_OD).sum(), W_OK


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.integers(3, 12), tokens=st.integers(2, 60), data=st.data())
def test_group_error_is_the_increase_of_the_loss_after_optimal_refit(seed, dim, tokens, data):
    W_OD, H_DD, P_DD = problem(seed, dim=dim, tokens=tokens)
    removed = data.draw(st.lists(st.integers(0, dim - 1), min_size=1, max_size=dim - 1, unique=True))
    kept_K = torch.tensor([j for j in range(dim) if j not in removed])
    expected, _ = least_squares_error(W_OD, H_DD, kept_K)
    elimination = obs.Elimination(W_OD, P_DD, dim)
    torch.testing.assert_close(elimination.group_errors(torch.tensor([removed]))[0], expected, **CLOSE)
    torch.testing.assert_close(elimination.remove(torch.tensor(removed)), expected, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.integers(4, 12), data=st.data())
def test_any_elimination_grouping_reaches_the_least_squares_optimum(seed, dim, data):
    """At every step W is the optimum, and both kinds of error are those of the smaller problem."""
    W_OD, H_DD, P_DD = problem(seed, dim=dim)
    before = W_OD.clone(), P_DD.clone()
    order = data.draw(st.permutations(range(dim)))
    elimination = obs.Elimination(W_OD, P_DD, dim)
    while len(order) > 1:
        cut = data.draw(st.integers(1, len(order) - 1))
        removed, order = order[:cut], order[cut:]
        elimination.remove(torch.tensor(removed))
        kept_K = torch.tensor(sorted(order))
        loss, expected = least_squares_error(W_OD, H_DD, kept_K)
        torch.testing.assert_close(elimination.W_OD[:, kept_K], expected, **CLOSE)
        errors_D = elimination.column_errors()
        assert set(errors_D.isinf().nonzero().flatten().tolist()) == set(range(dim)) - set(order)
        if len(order) > 2:
            pair, rest_K = torch.tensor([order[:2]]), torch.tensor(sorted(order[2:]))
            more = least_squares_error(W_OD, H_DD, rest_K)[0] - loss
            torch.testing.assert_close(elimination.group_errors(pair)[0], more, **CLOSE)
            more = least_squares_error(W_OD, H_DD, torch.tensor(sorted(order[1:])))[0] - loss
            torch.testing.assert_close(errors_D[order[0]], more, **CLOSE)
    assert torch.equal(before[0], W_OD)
    assert torch.equal(before[1], P_DD)


def test_single_columns_agree_in_all_scores():
    W_OD, _, P_DD = problem(1)
    elimination, singles = obs.Elimination(W_OD, P_DD, 0), torch.arange(8)[:, None]
    torch.testing.assert_close(elimination.column_errors(), elimination.group_errors(singles))
    torch.testing.assert_close(elimination.column_errors(), elimination.group_errors_paper(singles))
    torch.testing.assert_close(elimination.column_errors(), elimination.group_errors_diagonal(singles))


def test_the_papers_head_score_follows_its_equation():
    W_OD, _, P_DD = problem(2)
    columns = torch.tensor([[0, 1, 2], [5, 6, 7]])
    for got, S in zip(obs.Elimination(W_OD, P_DD, 0).group_errors_paper(columns), columns, strict=True):
        L_SS = torch.linalg.cholesky(P_DD[S][:, S])
        expected = sum(W_OD[:, j].square().sum() / L_SS[k, k] ** 2 for k, j in enumerate(S))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dim", [1, 7, 128, 129, 500])
def test_the_inverse_equals_that_of_the_damped_matrix_for_any_strip_size(dim):
    _, H_DD, P_DD = problem(3, dim=dim, tokens=2 * dim)
    torch.testing.assert_close(P_DD, torch.linalg.inv(H_DD), rtol=1e-7, atol=1e-12)
    assert torch.equal(P_DD, P_DD.T)


def test_inverting_does_not_change_h():
    H_DD = torch.diag(torch.tensor([1.0, 2.0, 1e-30], dtype=torch.float64))
    before = H_DD.clone()
    obs.invert(H_DD, 0.0)
    assert torch.equal(H_DD, before)


def gram_is_the_sum_of_outer_products(dim, dtype, device):
    gram, x = obs.Gram(dim, device), torch.randn(2, 3, 50, dim).to(device, dtype)
    for block in x:
        gram.add(block)
    flat_TD, H_DD = x.reshape(-1, dim).double(), gram.finish()
    torch.testing.assert_close(H_DD, flat_TD.T @ flat_TD, rtol=1e-4, atol=1e-3)
    assert torch.equal(H_DD, H_DD.T)
    assert gram.tokens == 300
    assert gram.H_DD.numel() == 0  # the accumulator's memory is the caller's now


@pytest.mark.parametrize("dim", [7, 128, 300, 800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_equals_the_sum_of_outer_products_for_any_strip_size(dim, dtype):
    gram_is_the_sum_of_outer_products(dim, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_gram_equals_the_sum_of_outer_products_on_a_gpu():
    """There 16-bit numbers take a kernel of their own."""
    for dim in (7, 128, 300, 800):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            gram_is_the_sum_of_outer_products(dim, dtype, "cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_gram_refuses_inputs_that_are_not_finite_or_overflow_when_squared(value):
    gram = obs.Gram(4, "cpu")
    gram.add(torch.tensor([[1.0, value, 0.0, 2.0]]))
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
    H_DD = x_TD.T @ x_TD
    inverse = obs.invert(H_DD, percdamp)
    assert inverse.damping >= percdamp
    elimination, order, errors = obs.Elimination(W_OD, inverse.P_DD, 8), list(range(8)), []
    while len(order) > 1:
        errors.append(elimination.remove(torch.tensor([order.pop(int(elimination.column_errors()[order].argmin()))])))
    assert bool(torch.stack(errors).isfinite().all())
    weight_OK, error = obs.refit(W_OD, H_DD, inverse.shift, torch.tensor([0, 1, 4]), torch.float64)
    assert bool(weight_OK.isfinite().all())
    assert error >= 0


def test_raised_damping_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        inverse = obs.invert(torch.ones(3, 3, dtype=torch.float64), 0.0)
    assert inverse.damping > 0
    assert "damping raised from 0" in caplog.text


def test_a_matrix_singular_within_rounding_counts_as_singular():
    """Rank 5 except for rounding, so a Cholesky factor of noise may exist; its inverse would be noise, too."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x_TD = torch.randn(40, 5, generator=generator, dtype=torch.float64)
        x_TD = x_TD @ torch.randn(5, 8, generator=generator, dtype=torch.float64)
        assert obs.invert(x_TD.T @ x_TD, 0.0).damping >= 1e-4


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(ValueError, match="stays indefinite"):
        obs.invert(torch.diag(torch.tensor([1.0, 1.0, -1e9], dtype=torch.float64)), 0.01)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kept=st.lists(st.integers(0, 7), min_size=1, max_size=7, unique=True),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_refit_is_the_rounded_optimum_and_reports_the_output_error(seed, kept, dtype):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    W_OD = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    H_DD, kept_K = x_TD.T @ x_TD, torch.tensor(sorted(kept))
    shift = obs.invert(H_DD, 0.01).shift
    weight_OK, error = obs.refit(W_OD, H_DD, shift, kept_K, dtype)
    _, optimum_OK = least_squares_error(W_OD, H_DD + shift * torch.eye(8, dtype=torch.float64), kept_K)
    assert weight_OK.dtype == dtype
    torch.testing.assert_close(weight_OK, optimum_OK.to(dtype), rtol=max(1e-9, torch.finfo(dtype).eps), atol=1e-12)
    outputs_TO = x_TD @ W_OD.T
    expected = (outputs_TO - x_TD[:, kept_K] @ weight_OK.double().T).square().sum() / outputs_TO.square().sum()
    assert error == pytest.approx(float(expected), rel=1e-9)


def test_a_very_small_relative_error_survives_cancellation():
    """Column 2 copies column 1 up to 1e-6: removing it costs about 1e-13 of ||WX||^2, still seen to three digits."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x_TD[:, 2] = x_TD[:, 1] + 1e-6 * x_TD[:, 2]
    W_OD, H_DD = torch.randn(4, 6, generator=generator, dtype=torch.float64), x_TD.T @ x_TD
    kept_K = torch.tensor([0, 1, 3, 4, 5])
    weight_OK, error = obs.refit(W_OD, H_DD, 0.0, kept_K, torch.float64)
    outputs_TO = x_TD @ W_OD.T
    expected = float((outputs_TO - x_TD[:, kept_K] @ weight_OK.T).square().sum() / outputs_TO.square().sum())
    assert expected < 1e-12
    assert error == pytest.approx(expected, rel=1e-2, abs=2e-15)


def test_a_map_without_output_has_no_error():
    W_OD, H_DD = torch.zeros(3, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    assert obs.refit(W_OD, H_DD, 0.1, torch.tensor([0, 2]), torch.float32)[1] == 0.0


def test_a_finished_gram_frees_its_memory():
    gram = obs.Gram(64, "cpu")
    gram.add(torch.randn(8, 64))
    gram.finish()
    assert gram.H_DD.untyped_storage().nbytes() == 0


class Precisions(TorchDispatchMode):
    """Records the float32 precision set for CUDA at each product."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm_.default:
            self.seen = torch.backends.cuda.matmul.fp32_precision
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("users", ["ieee", "tf32"])
def test_float32_is_multiplied_without_tf32_whatever_the_program_has_set(users):
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, users
    try:
        with Precisions() as seen:
            obs.Gram(8, "cpu").add(torch.randn(4, 8))
        assert seen.seen == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == users
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
