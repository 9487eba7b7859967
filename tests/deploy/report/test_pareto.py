"""The Pareto-optimal models of a sweep, which one is registered, and what table and plots show."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.report.pareto import OBJECTIVES, SweptModel, best_model, pareto_front, sweep_plots, sweep_rows


def swept(title: str, *figures: float | None, outside: str = "", schedule: str = "log") -> SweptModel:
    named = dict(zip(OBJECTIVES, figures, strict=True))
    return SweptModel(title=title, model="tiny", ratio=0.25, schedule=schedule, speedup=1.2, outside=outside, **named)


DENSE = swept("tiny", 20, 60, 100, 8, schedule="")
QUARTER = swept("tiny 25% log", 24, 55, 120, 6)
HALF = swept("tiny 50% log", 40, 45, 150, 4, outside="max_perplexity_ratio: 2.0000, 0.5000 above the limit 1.5")
BEATEN = swept("tiny 25% uniform", 26, 54, 119, 6)
ALL = [DENSE, QUARTER, HALF, BEATEN]

few = st.integers(0, 3).map(float)


@given(st.lists(st.tuples(few, few, few, few), min_size=1, max_size=8))
def test_the_pareto_front_equals_brute_force(figures):
    models = [swept(str(i), *values) for i, values in enumerate(figures)]
    front = pareto_front(models)

    def no_worse(a: SweptModel, b: SweptModel) -> list[bool]:
        higher = (a.accuracy >= b.accuracy, a.throughput >= b.throughput)
        return [a.perplexity <= b.perplexity, *higher, a.megabytes <= b.megabytes]

    for model in models:
        beaten = any(all(no_worse(other, model)) and not all(no_worse(model, other)) for other in models)
        assert (model in front) != beaten


def test_a_figure_that_one_model_lacks_does_not_count():
    worse_but_unknown = swept("unknown", 26, 54, None, 6)
    assert pareto_front([QUARTER, worse_but_unknown]) == [QUARTER]
    assert pareto_front([swept("a", None, None, None, 6), swept("b", None, None, None, 7)])[0].title == "a"


@pytest.mark.parametrize(
    ("prefer", "title"),
    [("size", "tiny 25% log"), ("speed", "tiny 25% log"), ("perplexity", "tiny 25% log"), ("accuracy", "tiny 25% log")],
)
def test_the_best_is_pruned_and_within_the_limits(prefer, title):
    assert best_model(ALL, prefer).title == title
    assert best_model([DENSE, HALF], prefer) is None


def test_each_preference_compares_its_own_figure():
    models = [swept("size", 9, 1, 1, 1), swept("speed", 9, 1, 9, 9), swept("perplexity", 1, 1, 1, 9)]
    models.append(swept("accuracy", 9, 9, 1, 9))
    for prefer in ("size", "speed", "perplexity", "accuracy"):
        assert best_model(models, prefer).title == prefer


def test_a_preferred_figure_that_is_missing_is_an_error():
    with pytest.raises(ValueError, match="prefer is 'speed', and no throughput was measured of no speed; prefer"):
        best_model([QUARTER, swept("no speed", 24, 55, None, 6)], "speed")


def test_the_table_marks_the_registered_model_and_those_outside_the_limits():
    remarks = {row[0]: row[-1] for row in sweep_rows(ALL, QUARTER)}
    assert remarks["tiny"] == "Pareto"
    assert remarks["tiny 25% log"] == "registered, Pareto"
    assert remarks["tiny 50% log"].startswith("Pareto, max_perplexity_ratio: 2.0000")
    assert remarks["tiny 25% uniform"] == ""
    assert sweep_rows([swept("a", None, None, None, 6)], None)[0] == ("a", "6.0", "", "", "", "1.20", "Pareto")


def test_quality_is_plotted_against_size_and_speed_where_both_were_measured():
    plots = sweep_plots(ALL, QUARTER)
    assert [plot.name for plot in plots] == [
        *("perplexity-megabytes", "perplexity-throughput", "accuracy-megabytes", "accuracy-throughput"),
    ]
    for plot in plots:
        assert {model.title for model in ALL} <= set(re.findall(r">([^<>]+)</text>", plot.svg))
    without_speed = [swept("a", 24, None, None, 6), swept("b", 25, None, None, 5)]
    assert [plot.name for plot in sweep_plots(without_speed, None)] == ["perplexity-megabytes"]
