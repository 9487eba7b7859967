"""What a config file may hold, and what wins over it."""

from pathlib import Path

from flows.cli.finding import flow_parameters
from flows.cli.flags import config_from, several
from flows.cli.sweeping import SweepPrune
from slimgpt.config import EvalConfig, PruneConfig
from tests.flows.cli.lines import one_line

ROOT = Path(__file__).parents[3]


def test_what_a_config_file_may_hold(slimgpt, tmp_path):
    file = tmp_path / "c.yaml"
    assert "does not exist" in one_line(slimgpt("compress", "--config", file))
    for text, message in {
        "prune: {ratoi: 0.2}": "prune.ratoi is not known; known are ratio",
        "modle: x": "modle is not known; known are model",
        "prune: 0.2": "prune is 0.2; it must hold settings by name",
        "prune: {ratio: 2}": "ratio is 2; it must be at most 0.9",
        "prune: {ratio: [": "is not YAML",
        "- a": "it must hold the flow's parameters",
        "keep: some": "keep is 'some'; input should be 'last' or 'all'",
        "skip: [benchmark, prune]": "skip is 'prune'; input should be 'evaluate' or 'benchmark'",
        "revision: 1234567": "revision is 1234567; input should be a valid string; put it in quotes",
    }.items():
        file.write_text(text)
        assert message in one_line(slimgpt("compress", "--config", file))
    file.write_text("runs: [a]")
    for command in ("compress", "sweep"):  # the runs folder is needed before the flow, which has the types
        assert "runs is ['a']; input should be a valid string" in one_line(slimgpt(command, "--config", file))


def test_what_a_config_file_leaves_empty_is_not_given(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name:\nruns:\nrevision: null\nmodel: tiny\nrounds: 2\nfirst_ratios: 0.3\nmodels: [a]\n")
    plain = dict.fromkeys(("name", "runs", "revision", "model", "rounds", "first_ratios", "models"))
    parameters = flow_parameters(str(file), {"prune": PruneConfig()}, {"prune": SweepPrune()}, plain)
    assert parameters == {
        **{"model": "tiny", "rounds": 2, "first_ratios": 0.3, "models": ["a"]},
        "prune": PruneConfig(),
    }
    assert several("first_ratios", 0.3, float) == (0.3,)  # a lone number
    assert several("models", ["a", None], str) == ("a",)


def test_flags_win_over_the_file_and_the_file_over_defaults():
    made = config_from(PruneConfig(num_samples=32), {"ratio": 0.4, "seed": 7}, {"ratio": 0.3})
    assert (made.ratio, made.seed, made.num_samples) == (0.3, 7, 32)
    assert config_from(EvalConfig(), {"tasks": "piqa, boolq"}).tasks == ("piqa", "boolq")
    explicit = config_from(PruneConfig(), {"layer_ratios": "0.1,0.2", "schedule": "explicit"})
    assert explicit.layer_ratios == (0.1, 0.2)
