"""A budget in bytes or parameters is kept, closely, and what cannot be kept is refused before any work."""

from dataclasses import replace
from pathlib import Path

import pytest

from slimgpt.checkpoints.lineage import load_lineage
from slimgpt.config import PruneConfig
from slimgpt.engine.plan import plan
from slimgpt.engine.pruner import prune
from slimgpt.report import load_report
from tests.tiny_families import CASES, write_family
from tests.tiny_models import write_dense


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return write_dense(
        tmp_path_factory.mktemp("large") / "dense", num_hidden_layers=4, hidden_size=128, intermediate_size=512
    )


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("name", ["target_size", "target_parameters"])
def test_the_result_keeps_within_the_target_and_comes_close(large, tmp_path, tiny_config, name, share):
    dense = plan(large, tiny_config(), estimate_seconds=False)
    most = int(share * (dense.bytes_before / 1e3 if name == "target_size" else dense.parameters_before / 1e3))
    config = replace(
        tiny_config(), ratio=0.25, ffn_multiple=8, **{name: f"{most}k{'B' if name == 'target_size' else ''}"}
    )
    planned = plan(large, config, estimate_seconds=False)
    report = prune(large, tmp_path / "out", config)
    step = 8 * 3 * 128 * 4  # bytes of the smallest change of an FFN
    if name == "target_size":
        assert 1000 * most - 3 * step < size_of(tmp_path / "out") <= 1000 * most
        assert report.requested == planned.requested == {"size": 1000 * most}
    else:
        assert 1000 * most - 3 * step / 4 < report.parameters_after <= 1000 * most
        assert report.requested == planned.requested == {"parameters": 1000 * most}
    assert report.config["ratio"] == pytest.approx(report.ratio, abs=0.01)
    assert report.config[name] == ""  # so that its command, with the ratio, gives the same again
    lineage = load_lineage(tmp_path / "out")
    assert lineage.last_pruning(name.replace("target", "requested")) == 1000 * most
    assert load_report(tmp_path / "out") == report


@pytest.mark.parametrize("case", CASES)
def test_every_family_keeps_within_the_target(case, tmp_path):
    """Biases go with their units, and embeddings stay."""
    dense = write_family(tmp_path / "dense", case)
    config = PruneConfig(calibration="python", num_samples=4, seq_len=32, ffn_multiple=8)
    most = int(0.85 * plan(dense, config, estimate_seconds=False).parameters_before / 1e3)
    report = prune(dense, tmp_path / "out", replace(config, target_parameters=f"{most}k"))
    assert 0.9 * 1000 * most < report.parameters_after <= 1000 * most


def test_what_cannot_be_reached_is_refused_with_the_nearest_that_can(large):
    parameters = plan(
        large, PruneConfig(ffn_multiple=8, calibration="python"), estimate_seconds=False
    ).parameters_before
    config = PruneConfig(ffn_multiple=8, calibration="python", target_parameters="10k")
    with pytest.raises(ValueError, match=r"target_parameters is 0\.0 M; the smallest that .* is (\S+) M: ask") as error:
        plan(large, config)
    smallest = float(str(error.value).split(" reach is ")[1].split()[0])
    plan(large, replace(config, target_parameters=f"{smallest + 0.1:.1f}M"), estimate_seconds=False)
    with pytest.raises(
        ValueError, match=r"target_size is 900,000\.0 MB; the model has \S+ MB: there is nothing to prune"
    ):
        plan(large, PruneConfig(target_size="900GB"))
    with pytest.raises(ValueError, match="there is nothing to prune"):
        plan(large, PruneConfig(target_parameters=f"{parameters / 1e3}k"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_size": "200MB", "ratio": 0.3}, "target_size 200MB and ratio 0.3 each say how much is removed"),
        ({"target_size": "200MB", "target_parameters": "1M"}, "target_size 200MB and target_parameters 1M each"),
        ({"target_size": "200"}, "target_size is '200'; it must be a number and kB, MB"),
    ],
)
def test_contradictions_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        PruneConfig(**fields)
