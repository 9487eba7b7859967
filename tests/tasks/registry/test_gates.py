"""Gates: what passes, what does not and by how much, and what cannot be compared."""

import dataclasses
import math

import pytest

from tasks.registry.gates import Figures, GateConfig, judge, refusals

OFF = dict.fromkeys((field.name for field in dataclasses.fields(GateConfig)), 0)
MEASURED = Figures(
    "tiny",
    dense={"w/perplexity": 10.0, "piqa/acc": 0.5, "piqa/acc_norm": 0.8, "boolq/acc": 0.4},
    pruned={"w/perplexity": 15.0, "piqa/acc": 0.1, "piqa/acc_norm": 0.6, "boolq/acc": 0.3},
    speedup=1.2,
    settings={
        "evaluation.limit": "20",
        "bench.input_len": "16",
        "bench.pairs": "3",
        "data.w": "abc",
        "bench_machine": "cpu",
    },
)


def changed(**fields):
    return dataclasses.replace(MEASURED, **fields)


@pytest.mark.parametrize(
    ("gate", "figure"),  # by hand: 15 / 10; (0.6 + 0.3) / (0.8 + 0.4), acc_norm where there is one; as measured
    [("max_perplexity_ratio", 1.5), ("min_accuracy_retention", 0.75), ("min_speedup", 1.2)],
)
@pytest.mark.parametrize("apart", [0.01, -0.01])
def test_a_gate_against_the_dense_model(gate, figure, apart):
    [judged] = judge(MEASURED, None, GateConfig(**{**OFF, gate: figure + apart}))
    assert judged.value == pytest.approx(figure)
    passes = (apart > 0) == (gate == "max_perplexity_ratio")
    assert bool(judged.problem) is not passes
    if not passes:
        side = "above" if gate == "max_perplexity_ratio" else "below"
        assert refusals([judged]) == f"{gate}: {figure:.4f}, 0.0100 {side} the limit {figure + apart:g}"


@pytest.mark.parametrize(
    ("gate", "figure"),  # 15 / 12; 0.9 / 1.0 halved; 1.2 / 1.5
    [("champion_max_perplexity_ratio", 1.25), ("champion_min_accuracy_retention", 0.9), ("champion_min_speedup", 0.8)],
)
def test_a_gate_against_the_champion(gate, figure):
    pruned = {"w/perplexity": 12.0, "piqa/acc": 0.9, "piqa/acc_norm": 0.7, "boolq/acc": 0.3}
    champion = changed(pruned=pruned, speedup=1.5)
    [judged] = judge(MEASURED, champion, GateConfig(**{**OFF, gate: figure + 0.1}))
    assert judged.value == pytest.approx(figure)
    assert judge(MEASURED, None, GateConfig(**{**OFF, gate: figure + 0.1})) == []  # the first champion


def test_what_is_required_and_was_not_measured_does_not_pass():
    problems = refusals(judge(Figures("tiny"), None, GateConfig()))
    assert "max_perplexity_ratio: no perplexity was measured; measure it, or set max_perplexity_ratio to 0" in problems
    assert "min_accuracy_retention: no accuracy was measured" in problems
    assert "min_speedup: no throughput was measured" in problems
    assert judge(Figures("tiny"), None, GateConfig(**OFF)) == []


def test_a_figure_that_is_not_a_number_does_not_pass():
    """As of a model whose outputs overflow: no comparison with a limit holds, in neither direction."""
    broken = {"w/perplexity": math.nan, "piqa/acc_norm": math.nan, "boolq/acc": 0.3}
    judged = judge(changed(pruned=broken, speedup=math.nan), MEASURED, GateConfig())
    assert [gate.name for gate in judged if gate.problem] == [field.name for field in dataclasses.fields(GateConfig)]
    assert "max_perplexity_ratio: what was measured is not a number (nan); measure it, or set" in refusals(judged)


@pytest.mark.parametrize(
    ("champion", "gates", "why"),
    [
        (changed(base_model="other"), {"champion_min_speedup"}, "another model (other)"),
        (
            changed(settings={"bench.input_len": "32"}),
            {"champion_min_speedup"},
            "another bench.input_len (32, here 16)",
        ),
        (changed(settings={"bench_machine": "H100"}), {"champion_min_speedup"}, "another bench_machine"),
        (changed(speedup=None), {"champion_min_speedup"}, "no throughput was measured of it"),
        (
            changed(settings={"evaluation.limit": "4"}),
            {"champion_max_perplexity_ratio", "champion_min_accuracy_retention"},
            "another evaluation.limit (4, here 20)",
        ),
        (
            changed(settings={"data.w": "abd"}),
            {"champion_max_perplexity_ratio", "champion_min_accuracy_retention"},
            "another data.w",
        ),
        (changed(pruned={"v/perplexity": 1.0, **MEASURED.pruned}), {"champion_max_perplexity_ratio"}, "another perpl"),
        (changed(pruned={"w/perplexity": 15.0}), {"champion_min_accuracy_retention"}, "other tasks"),
        (changed(settings={"bench.pairs": "9", "bench.new": "1"}), set(), ""),
    ],
)
def test_figures_that_do_not_compare_do_not_pass(champion, gates, why):
    refused = [gate for gate in judge(MEASURED, champion, GateConfig(min_accuracy_retention=0)) if gate.problem]
    assert {gate.name for gate in refused} == gates
    assert all(why in gate.problem and gate.value is None for gate in refused)


def test_a_limit_below_zero_is_refused():
    with pytest.raises(ValueError, match="min_speedup is -1; it must be at least 0"):
        GateConfig(min_speedup=-1)
