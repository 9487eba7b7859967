"""A target in speed: the widths spend milliseconds, what cannot be reached is refused, a run keeps to its table."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from slimgpt.checkpoints.lineage import load_lineage
from slimgpt.config import PruneConfig
from slimgpt.engine.chosen import Chosen
from slimgpt.engine.job import Job
from slimgpt.engine.plan import plan
from slimgpt.engine.prices import priced
from slimgpt.engine.pruner import prune
from slimgpt.engine.ranks import Ranks
from slimgpt.method.latency import LatencyTable

from .test_prices import own_cache, shapes_of  # noqa: F401  (the first: a fixture of every test)
from .test_resume import CrashError, crash_after, model_files


@pytest.fixture(scope="module")
def table(dense):
    """128 channels take as long as 96; 20 of 100 ms are no layer's."""
    shapes = Job(dense, PruneConfig()).shapes
    return LatencyTable(100.0, shapes[0], len(shapes), 0.5, 1.0, ((0, 0.0), (64, 8.0), (96, 12.0), (128, 12.0)), {})


@pytest.fixture
def config(tiny_config):
    def of(speedup, **fields):
        return tiny_config(schedule="nats", target_speedup=speedup, **{"ratio": 0.25, "ffn_multiple": 32, **fields})

    return of


def chosen(dense, config, table):
    job = Job(dense, config, latency=table)
    with torch.inference_mode():
        return job, Chosen(priced(job, job.calibration(), Ranks(), None), job.config, job.shapes, job.speed)


@pytest.mark.parametrize("fields", [{}, {"targets": "ffn"}, {"targets": "attention"}, {"skip_first": 1}])
@pytest.mark.parametrize("speedup", [1.1, 1.2])
def test_the_model_becomes_as_fast_as_asked_and_hardly_faster(dense, tmp_path, config, table, fields, speedup):
    asked = config(speedup, ffn_multiple=4, **fields)
    report = prune(dense, tmp_path / "out", asked, latency=table)
    after = [layer.shape_of(table.shape) for layer in report.layers]
    units = 0.5 * 2 + 1.0 * 2 if asked.targets == "attention" else 0.5  # the smallest that goes, in ms
    assert speedup <= table.speedup(after) == report.predicted_speedup < 1 / (1 / speedup - units / 100)
    assert report.requested == {"speedup": speedup}
    planned = plan(dense, asked, latency=table, measure=True, estimate_seconds=False)
    assert (planned.measured, planned.shapes, planned.predicted_speedup) == (True, after, report.predicted_speedup)
    # so that its command gives the same again, wherever auto is another dtype
    assert PruneConfig(**report.config) == replace(asked, dtype="float32")
    lineage = load_lineage(tmp_path / "out")
    assert lineage.last_pruning("requested_speedup") == speedup
    assert lineage.last_pruning("predicted_speedup") == report.predicted_speedup
    assert lineage.requested_ratio == pytest.approx(report.ratio)
    for layer in report.layers[: asked.skip_first]:
        assert layer.ratio == 0


def test_prices_alone_choose_what_trying_all_widths_finds(dense, config, table):
    """Of FFNs of 128, 96, 64 and 32 channels in four layers: 256 ways."""
    job, plan = chosen(dense, config(1.15, targets="ffn", log_share=0.0), table)
    options = [layer.widths for layer in plan.prices.layers]
    ways = []
    for way in product(*options):
        shapes = [replace(shape, intermediate_size=width) for shape, (width, _) in zip(job.shapes, way, strict=True)]
        if table.speedup(shapes) >= 1.15:
            ways.append((sum(nats for _, nats in way), [width for width, _ in way]))
    assert plan.widths == min(ways)[1]
    assert 128 in plan.widths or 96 not in plan.widths  # 96 would cost nats and save no time


def test_an_interrupted_run_goes_on_with_its_own_table_alone(dense, tmp_path, config, table):
    asked = config(1.2)
    prune(dense, tmp_path / "reference", asked, latency=table)
    with pytest.raises(CrashError):
        prune(dense, tmp_path / "out", asked, latency=table, on_layer=crash_after(2))
    with pytest.raises(FileExistsError, match="latency"):
        prune(dense, tmp_path / "out", asked, latency=replace(table, head_ms=0.6))
    assert prune(dense, tmp_path / "out", asked, latency=table).replayed_layers == 2
    assert model_files(tmp_path / "out") == model_files(tmp_path / "reference")


def test_what_cannot_be_reached_is_refused_with_the_nearest_that_can(dense, config, table):
    with pytest.raises(
        ValueError, match=r"target_speedup is 9; the fastest that these options reach is (\S+), "
    ) as error:
        plan(dense, config(9.0), latency=table)
    fastest = float(str(error.value).split(" reach is ")[1].split(",")[0])
    planned = plan(dense, config(fastest), latency=table, estimate_seconds=False)
    assert planned.requested == {"speedup": fastest}
    with pytest.raises(ValueError, match="the fastest that these options reach is"):
        plan(dense, config(fastest + 0.01), latency=table)


def test_a_table_that_is_missing_or_of_another_model_is_refused(dense, dense_mha, config, table):
    with pytest.raises(
        ValueError, match=r"target_speedup is 1\.2, and what .* is not measured; `slimgpt latency MODEL`"
    ):
        plan(dense, config(1.2))
    with pytest.raises(ValueError, match="the table of milliseconds is of 4 layers of .*; the model has others"):
        plan(dense_mha, config(1.2), latency=table)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_speedup": 0.9}, r"target_speedup is 0\.9; it must be above 1, such as 1\.4"),
        ({"target_speedup": 1.4, "ratio": 0.3}, r"target_speedup 1\.4 and ratio 0\.3 each say how much is removed"),
        ({"target_speedup": 1.4, "schedule": "log"}, "only the schedule nats spends milliseconds"),
    ],
)
def test_contradictions_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        PruneConfig(**fields)
