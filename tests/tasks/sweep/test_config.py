"""What a sweep can do, and what is refused before any work."""

from pathlib import Path

import pytest

from slimgpt.checkpoints.lineage import Checkpoint, Lineage
from slimgpt.config import EvalConfig, PruneConfig, RecoverConfig
from tasks.preflight.models import ResolvedModel
from tasks.sweep.config import SweepConfig
from tasks.sweep.points import check_judgeable, grid_of, title_of
from tasks.sweep.runners import runner_of


def test_lists_of_json_and_yaml_become_tuples_without_repeats():
    grid = SweepConfig(ratios=[0.25, 0.5, 0.25], schedules=["log", "uniform"])
    assert (grid.ratios, grid.schedules) == ((0.25, 0.5), ("log", "uniform"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": ()}, "ratios is empty; name at least one"),
        ({"ratios": (0.25, 0.95)}, "ratios holds 0.95; each must be more than 0 and at most 0.9"),
        ({"ratios": (0.0,)}, "ratios holds 0; each must"),
        (
            {"schedules": ("log", "explicit")},
            "schedules holds 'explicit'; each must be one of nats, log, linear, uniform, log_decreasing",
        ),
        ({"runner": "ray"}, "runner is 'ray'; it must be one of threads, dask"),
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"prefer": "fame"}, "prefer is 'fame'; it must be one of"),
        ({"dask_scheduler": "tcp://host:8786"}, "it belongs to runner='dask'"),
        ({"max_size_ratio": -1.0}, "max_size_ratio is -1.0; it must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        SweepConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "evaluation", "no_serving", "message"),
    [
        ({"min_speedup": 1.1}, {}, "no wheel fits", r"min_speedup is 1.1, and .*\(no wheel fits\); set min_speedup to"),
        ({"prefer": "speed"}, {}, "no wheel fits", "prefer is 'speed', and throughput cannot .*; prefer size"),
        ({}, {"tasks": ("none",)}, "", "min_accuracy_retention is 0.8, and the evaluation has no task"),
        ({}, {"perplexity": "none"}, "", "max_perplexity_ratio is 2.5, and the evaluation measures no perplexity"),
    ],
)
def test_limits_in_figures_that_will_not_be_measured_are_refused(settings, evaluation, no_serving, message):
    with pytest.raises(ValueError, match=message):
        check_judgeable(SweepConfig(**settings), EvalConfig(**evaluation), no_serving)


def test_limits_that_are_off_need_no_figure():
    off = SweepConfig(min_accuracy_retention=0, max_perplexity_ratio=0)
    check_judgeable(off, EvalConfig(tasks=("none",)), "no wheel fits")


def test_the_runner_is_prefects():
    assert type(runner_of(SweepConfig())).__name__ == "ThreadPoolTaskRunner"
    assert type(runner_of(SweepConfig(runner="dask"))).__name__ == "DaskTaskRunner"


def named(model):
    return ResolvedModel(model, Checkpoint(Path(model), "", Lineage()))


def test_every_point_has_a_title_of_its_own():
    model = named("folder/tiny")
    ratios = (0.29, 0.125, 0.12, 0.13)
    titles = [title_of(model, PruneConfig(ratio=ratio)) for ratio in ratios]
    assert titles == ["tiny 29% nats", "tiny 12.5% nats", "tiny 12% nats", "tiny 13% nats"]


def test_a_folder_is_called_by_its_own_name_and_a_registered_model_by_its(tmp_path, monkeypatch):
    (tmp_path / "tiny" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "tiny" / "below")
    labels = {model: named(model).label for model in ("..", ".", "../below/..", "models:/a/3", "models:/a@b", "o/n")}
    assert [*labels.values()] == ["tiny", "below", "tiny", "a@3", "a@b", "n"]
    monkeypatch.setenv("HOME", str(tmp_path / "tiny" / "below"))
    assert named("~/..").label == "tiny"


def test_two_models_of_one_name_are_refused():
    models = [named(model) for model in ("a/tiny", "b/tiny", "b/other")]
    with pytest.raises(ValueError, match="models holds a/tiny, b/tiny, which have the same name in tables"):
        grid_of(models, SweepConfig(), PruneConfig(), RecoverConfig(tokens=""))


@pytest.mark.parametrize(
    ("name", "value"), [("target_size", "1MB"), ("target_parameters", "1M"), ("target_speedup", 1.2)]
)
def test_a_target_beside_the_grids_ratios_is_refused(name, value):
    with pytest.raises(ValueError, match=f"prune.{name} is given; a sweep tries the ratios of its grid: leave it out"):
        grid_of([named("tiny")], SweepConfig(), PruneConfig(**{name: value}), RecoverConfig(tokens=""))
