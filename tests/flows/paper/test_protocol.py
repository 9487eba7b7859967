"""The config files of the paper's runs: complete, and what the paper says of them comes out of them."""

import pytest
import yaml

from benchmarks.random_llama import SHAPES, Shape
from flows.paper.attempts import ReproduceConfig, attempts_of, still_to_do
from flows.paper.measured import Measured, add_measured, read_measured
from flows.paper.page import write_page
from flows.paper.protocol import HERE, SIDES, read_table, table_names
from slimgpt.engine.budget import within_budget
from slimgpt.method.allocation import layer_ratios, planned_shapes
from slimgpt.quantities import COUNTS, read_quantity

DOCS = HERE.parents[1] / "docs"
TABLES = [read_table(name) for name in table_names()]
SHAPES_OF = {
    "llama-7b": SHAPES["llama-2-7b"],
    "llama-13b": SHAPES["llama-2-13b"],
    "llama-30b": Shape(6656, 17920, 60, 52, 52),
    "baichuan-7b": Shape(4096, 11008, 32, 32, 32, 64_000),
}


def total(shape, layers):
    embedding = shape.vocab_size * shape.hidden_size
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    return 2 * embedding + norms + sum(layer.parameters for layer in layers)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_file_is_a_run_of_its_table_and_every_figure_one_of_its_measures(table):
    files = {path.stem for path in (HERE / table.name).glob("*.yaml")} - {"table"}
    assert files == {run.name for run in table.runs}
    names = {measure.name for measure in table.measures}
    for run in table.runs:
        for who, sides in run.figures.items():
            assert sides.keys() <= set(run.sides) <= set(SIDES), (run.name, who)
            assert all(figures.keys() <= names for figures in sides.values()), (run.name, who)
    for order in table.orders:
        assert order["measure"] in names and set(order["rows"]) <= {run.name for run in table.runs}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_what_the_paper_says_of_its_orders_is_in_its_own_figures(table):
    for order in table.orders:
        figures = {run.name: run.figures["paper"]["pruned"][order["measure"]] for run in table.runs}
        values = [figures[name] for name in order["rows"]]
        assert values == sorted(values)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_means_of_the_seven_tasks_are_the_means_of_the_figures(table):
    """A figure that was copied wrong would not fit its mean; the paper rounds to two digits."""
    for run in table.runs:
        for side in run.figures.get("paper", {}).values():
            mean = next((measure for measure in table.measures if measure.mean), None)
            if mean is not None and all(part in side for part in mean.mean):
                assert sum(side[part] for part in mean.mean) / 7 == pytest.approx(side["mean"], abs=0.06), run.name


@pytest.mark.parametrize("name", SHAPES_OF)
def test_the_paper_s_model_comes_to_the_paper_s_number_of_parameters(name):
    table, shape = read_table(name), SHAPES_OF[name]
    dense = [shape.layer] * shape.num_hidden_layers
    assert table.is_own(total(shape, dense))
    for attempt in attempts_of(table, ReproduceConfig(), total(shape, dense)):
        if attempt.prune is not None:
            config = within_budget(attempt.prune, dense, lambda layers: total(shape, layers), item=2, beside=0)
            reached = total(shape, planned_shapes(config, dense))
            wanted = attempt.run.figures["paper"]["pruned"]["parameters"]
            assert reached == pytest.approx(read_quantity(wanted, COUNTS, "parameters"), rel=0.01)


def test_the_first_and_last_ratios_of_llama_7b_are_those_of_the_paper_s_appendix():
    """20 %: 0.0625 to 0.25; 50 %: 0.125 to 0.656, read off a figure."""
    shape = SHAPES["llama-2-7b"]
    dense = [shape.layer] * shape.num_hidden_layers
    ends = {}
    for attempt in attempts_of(read_table("llama-7b"), ReproduceConfig(), total(shape, dense)):
        if attempt.prune is not None:
            config = within_budget(attempt.prune, dense, lambda layers: total(shape, layers), item=2, beside=0)
            ratios = layer_ratios(config, [layer.parameters for layer in dense])
            ends[attempt.run.name] = ratios[0], ratios[-1]
    assert ends["p20"] == pytest.approx((0.0625, 0.25), abs=0.003)
    assert ends["p50"] == pytest.approx((0.125, 0.656), abs=0.012)


def test_the_paper_s_settings_are_the_preset_s_and_what_a_file_changes():
    attempts = {one.run.name: one for one in attempts_of(read_table("ablations"), ReproduceConfig(), 6738415616)}
    full, uniform = attempts["full"].prune, attempts["uniform"].prune
    assert (full.schedule, full.num_samples, full.seq_len, full.calibration) == ("log", 256, 2048, "c4")
    assert (full.target_parameters, full.head_error, full.bos) == ("3.40B", "paper", "none")
    assert (uniform.schedule, uniform.target_parameters) == ("uniform", "3.50B")
    assert attempts["head-diagonal"].prune.head_error == "diagonal"
    assert attempts["group-128"].prune.group_size_max == attempts["group-128"].prune.group_size_min == 128


def test_another_model_is_pruned_by_the_ratio_and_at_the_further_ratios():
    attempts = attempts_of(read_table("ablations"), ReproduceConfig(samples_share=1 / 16, max_blocks=96), 134_515_008)
    assert [(one.run.name, one.prune.ratio) for one in attempts if one.run.name == "full"] == [
        ("full", 0.5),
        ("full", 0.2),
    ]
    assert {(one.prune.num_samples, one.prune.target_parameters) for one in attempts} == {(16, "")}
    evaluation = attempts[0].evaluations["validation"]
    assert (evaluation.max_blocks, evaluation.seq_len, evaluation.bos) == (96, 128, "auto")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_measure_has_a_figure_when_its_evaluations_are_made(table):
    """Also a mean whose parts the table does not show; what pruning and the benchmark give is not of an evaluation."""
    attempt = attempts_of(table, ReproduceConfig(), table.parameters)[0]
    metrics = {name: {} for name in attempt.evaluations}
    for i, measure in enumerate(table.known.values()):
        if measure.evaluation in metrics:
            metrics[measure.evaluation][measure.metric] = float(i)
    for measure in table.measures:
        if measure.evaluation or measure.mean:
            parts = [table.known[name] for name in measure.mean] or [measure]
            expected = [part.scale * metrics[part.evaluation][part.metric] for part in parts]
            assert table.figure(measure, metrics) == pytest.approx(sum(expected) / len(expected))


def test_a_limit_holds_for_the_prompts_of_a_benchmark_too():
    [attempt, _] = attempts_of(read_table("inference"), ReproduceConfig(limit=4), 134_515_008)
    assert (attempt.bench.num_prompts, attempt.bench.output_len, attempt.evaluations) == (4, 512, {})
    [attempt, _] = attempts_of(read_table("inference"), ReproduceConfig(measures=("parameters",)), 134_515_008)
    assert attempt.bench is None


def test_the_tokens_of_each_recovery_can_be_fewer_for_a_trial():
    table, of_7b = read_table("llama-7b"), 6_738_415_616
    for given, tokens in ("", "all"), ("64k", "64k"):
        attempts = attempts_of(table, ReproduceConfig(recovery_tokens=given), of_7b)
        assert {attempt.recover.tokens for attempt in attempts if attempt.recover} == {tokens}
    assert ReproduceConfig().complete and not ReproduceConfig(recovery_tokens="64k").complete
    assert one(recovery_tokens="64k").title == "small (0.5 of the sequences, recovered on 64k tokens, 8 blocks of text)"
    with pytest.raises(ValueError, match="recovery_tokens is 'few'; it must be a whole number"):
        ReproduceConfig(recovery_tokens="few")
    with pytest.raises(ValueError, match="recovery_tokens is '64k', and no run of the table ablations trains; leave"):
        attempts_of(read_table("ablations"), ReproduceConfig(recovery_tokens="64k"), 1)


def test_what_is_not_in_a_table_is_refused_with_what_is():
    with pytest.raises(ValueError, match="table 'llama-8b' is not known; known are ablations, baichuan-7b, "):
        read_table("llama-8b")
    table = read_table("llama-13b")
    with pytest.raises(ValueError, match="run 'p33' is not in the table llama-13b; it has dense, p20, p50"):
        attempts_of(table, ReproduceConfig(only=("p33",)), 1)
    with pytest.raises(ValueError, match="measure 'mmlu' is not in the table llama-13b; it has parameters, "):
        attempts_of(table, ReproduceConfig(measures=("mmlu",)), 1)
    with pytest.raises(ValueError, match="samples_share is 0"):
        ReproduceConfig(samples_share=0)


def one(**changed):
    fields = {
        "table": "ablations",
        "run": "full",
        "ratio": 0.5,
        "side": "pruned",
        "model": "small",
        "digest": "00ff",
        "own": False,
        "samples_share": 0.5,
        "limit": 0,
        "max_blocks": 8,
        "figures": {"parameters": 1000, "perplexity": 40.0},
        "date": "2026-11-28",
        "device": "cpu (x86_64)",
        "dtype": "float32",
        "commit": "0123abcd",
        "versions": {"torch": "2"},
    }
    return Measured(**{**fields, **changed})


def test_what_is_measured_is_added_and_a_later_figure_of_the_same_replaces_it(tmp_path):
    file = tmp_path / "docs/reproduction.json"
    add_measured(file, [one()])
    add_measured(file, [one(run="uniform"), one(figures={"perplexity": 41.0, "mean": 50.0})])
    assert [(m.run, m.figures) for m in read_measured(file)] == [
        ("full", {"parameters": 1000, "perplexity": 41.0, "mean": 50.0}),
        ("uniform", {"parameters": 1000, "perplexity": 40.0}),
    ]
    file.write_text("[{}]")
    with pytest.raises(ValueError, match="reproduction.json is damaged .*; restore it, or move it away"):
        read_measured(file)


def test_only_what_lacks_a_figure_of_this_model_and_protocol_is_still_to_do():
    config = ReproduceConfig(samples_share=0.5, max_blocks=8, measures=("parameters", "perplexity"))
    attempts = attempts_of(read_table("ablations"), config, 1000)

    def left(*known):
        return [(a.run.name, a.run.ratio) for a in still_to_do(attempts, list(known), one().source)]

    assert ("full", 0.5) not in left(one()) and ("full", 0.2) in left(one())
    assert len(left(one())) == len(attempts) - 1
    others = (
        {"model": "x"},
        {"digest": "ff00"},
        {"limit": 3},
        {"samples_share": 1},
        {"recovery_tokens": "64k"},
        {"figures": {"parameters": 1}},
        {"table": "samples"},
    )
    for other in others:
        assert len(left(one(**other))) == len(attempts), other


def test_the_page_has_every_figure_of_the_paper_and_says_where_its_order_does_not_hold(tmp_path):
    path = tmp_path / "reproduction.md"
    shown = {
        "full": 30.0,
        "linear": 35.0,
        "uniform": 34.0,
        "log-decreasing": 90.0,
        "group-128": 31.0,
        "head-diagonal": 30.0,
    }
    write_page(path, [one(run=run, figures={"perplexity": value}) for run, value in shown.items()])
    text = path.read_text()
    for table in TABLES:
        assert f"`slimgpt reproduce {table.name}`" in text
    assert "| 50% | uniform schedule | perplexity, validation split | 123.05 |  |  |  |  |  | 34.00 |" in text
    assert "| 20% | SlimGPT | perplexity, test split, 2048 tokens |  | 7.46 (RestoreLCC) |" in text
    assert "| 50% | SlimGPT | perplexity, C4, 2048 tokens |  | 26.72 (GRAIL) |" in text
    column = "small (0.5 of the sequences, 8 blocks of text), 50%"
    assert f"  - {column}: does not hold (30.00, 35.00, 34.00, 90.00)" in text
    assert f"  - {column}: holds (30.00, 31.00)" in text
    assert f"  - {column}: no difference (30.00, 30.00)" in text
    own = one(table="llama-7b", run="p20", ratio=0.2, own=True, model="llama-7b", samples_share=1, max_blocks=0)
    write_page(path, [own])
    line = next(line for line in path.read_text().splitlines() if line.startswith("| 20% | SlimGPT | perplexity, val"))
    assert line.startswith("| 20% | SlimGPT | perplexity, validation split | 16.99 |  | 40.00 | 2026-11-28 | cpu")


def test_a_bar_in_a_model_s_name_does_not_part_the_page_s_columns(tmp_path):
    write_page(tmp_path / "page.md", [one(model="a|b", figures={"perplexity": 9.0})])
    [head] = [line for line in (tmp_path / "page.md").read_text().splitlines() if r"a\|b" in line and line[0] == "|"]
    assert head.endswith(r"| commit | a\|b (0.5 of the sequences, 8 blocks of text) |")


def test_the_page_in_docs_is_that_of_its_figures(tmp_path):
    write_page(tmp_path / "reproduction.md", read_measured(DOCS / "reproduction.json"))
    assert (tmp_path / "reproduction.md").read_text() == (DOCS / "reproduction.md").read_text()


def test_the_files_are_yaml_that_begins_with_what_the_run_is():
    for path in HERE.glob("*/*.yaml"):
        assert path.read_text().startswith("# "), path
        assert yaml.safe_load(path.read_text())["title"]
