"""Prices in nats against the trace formula in float64, on refitted weights."""

import pytest
import torch

from slimgpt.method import obs
from slimgpt.method.nats import HeadOption, channel_prices, head_options, root, unit_orders
from slimgpt.method.selection import channel_path, head_path
from slimgpt.method.shapes import HeadLayout

TOKENS = 200


def problem(rows, columns, *, rank=None):
    """W, H (a sum over TOKENS) and G (a mean) of random correlated data."""
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    W_OD, x_TD = rand(rows, columns), rand(TOKENS, columns) @ rand(columns, columns)
    g_TO = rand(TOKENS, rank or rows) @ rand(rank or rows, rows)
    return W_OD, x_TD.T @ x_TD, g_TO.T @ g_TO / TOKENS


def nats(W_OD, H_DD, G_OO, kept, shift):
    """1/2 tr(G dW (H/n) dW^T) of the weight that is refitted on the kept columns."""
    W_OK, _ = obs.refit(W_OD, H_DD, shift, kept, torch.float64)
    dW_OD = -W_OD.clone()
    dW_OD[:, kept] += W_OK
    return 0.5 * torch.trace(G_OO @ dW_OD @ (H_DD / TOKENS) @ dW_OD.T).item()


@pytest.mark.parametrize("rank", [None, 3])
def test_the_root_is_one_of_g_also_where_g_is_singular(rank):
    _, _, G_OO = problem(8, 4, rank=rank)
    R_OO = root(G_OO)
    torch.testing.assert_close(R_OO.T @ R_OO, G_OO, rtol=1e-9, atol=1e-9 * G_OO.diagonal().mean().item())


def test_a_map_without_gradients_costs_nothing_and_damaged_ones_are_refused():
    assert root(torch.zeros(3, 3, dtype=torch.float64)).abs().max() == 0
    with pytest.raises(ValueError, match="not positive semi-definite"):
        root(torch.diag(torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)))


def test_channel_prices_are_the_trace_formula():
    W_OD, H_DD, G_OO = problem(12, 40)
    inverse, R_OO = obs.invert(H_DD, 0.01), root(G_OO)
    widths = [40, 32, 24, 8]
    prices = channel_prices(R_OO @ W_OD, inverse, widths, TOKENS, group=4)
    assert prices[0] == 0
    for width, price in zip(widths[1:], prices[1:], strict=True):
        path = channel_path(R_OO @ W_OD, inverse.P_DD, 40 - width, group_size_max=4, group_size_min=4)
        stays = torch.ones(40, dtype=torch.bool)
        stays[path.order] = False
        assert price == pytest.approx(nats(W_OD, H_DD, G_OO, stays.nonzero().flatten(), inverse.shift), rel=1e-9)


def test_head_options_are_the_trace_formula():
    layout = HeadLayout(num_heads=6, num_kv_heads=3, head_dim=4, hidden_size=12)
    W_OD, H_DD, G_OO = problem(12, 24)
    inverse, RW_OD = obs.invert(H_DD, 0.01), root(G_OO) @ W_OD
    options = head_options(RW_OD, inverse, layout, TOKENS)
    assert {(o.num_heads, o.num_kv_heads) for o in options} == {(6, 3), (4, 2), (2, 1), (3, 3), (2, 2), (1, 1)}
    assert options[0] == HeadOption(6, 3, (), 0.0)
    for option in options[1:]:
        path = head_path(RW_OD, inverse.P_DD, layout, order=option.order)
        heads, kv_heads = path.kept(len(option.order))
        assert (len(heads), len(kv_heads)) == (option.num_heads, option.num_kv_heads)
        assert option.nats == pytest.approx(nats(W_OD, H_DD, G_OO, layout.columns(heads), inverse.shift), rel=1e-9)


@pytest.mark.parametrize(
    ("layout", "unit", "multiple", "layouts"),
    [
        ((9, 3), "auto", 1, {(6, 2), (3, 1), (6, 3), (3, 3), (4, 2), (2, 2), (2, 1), (1, 1)}),
        ((9, 3), "kv_group", 1, {(6, 2), (3, 1)}),
        ((9, 3), "query", 1, {(6, 3), (3, 3)}),
        ((4, 4), "auto", 1, {(3, 3), (2, 2), (1, 1)}),
        ((16, 4), "auto", 2, {(8, 2), (12, 4), (8, 4), (4, 4), (6, 2), (4, 2), (2, 2)}),
        ((1, 1), "auto", 1, set()),
    ],
)
def test_orders_pass_every_layout_that_units_lead_to(layout, unit, multiple, layouts):
    passed = set()
    dense = HeadLayout(*layout, head_dim=1, hidden_size=1)
    for order in unit_orders(dense, unit, multiple):
        left = layout
        for heads, kv_heads in order:
            assert (heads, kv_heads) in HeadLayout(*left, head_dim=1, hidden_size=1).units(unit, multiple)
            left = left[0] - heads, left[1] - kv_heads
            passed.add(left)
    assert passed == layouts
