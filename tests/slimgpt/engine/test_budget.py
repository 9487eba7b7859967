"""A budget in bytes or parameters is kept, closely, and what cannot be kept is refused before any work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def in_layers(name: str) -> bool:
    return name.startswith("model.layers.")


WIDER = {  # what is stored in float32 while all else is bfloat16
    "embeddings": lambda name: not in_layers(name),
    "layers": in_layers,
    "some projections": lambda name: "layers.0." in name or "gate_proj" in name,
}


def write_mixed(folder: Path, wider: str) -> Path:
    write_dense(folder, dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: tensor.float() if WIDER[wider](name) else tensor for name, tensor in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("schedule", ["nats", "log"])
@pytest.mark.parametrize(("wider", "most", "item"), [("embeddings", 340, 2), ("layers", 550, 4)])
def test_a_size_is_kept_where_dtypes_are_mixed_and_by_no_more_than_a_step(
    tmp_path, tiny_config, schedule, wider, most, item
):
    """Only projections go, so what goes counts at their size; the dry run says the bytes that are written."""
    dense = write_mixed(tmp_path / "dense", wider)
    config = tiny_config(ratio=0.25, schedule=schedule, ffn_multiple=8, target_size=f"{most}kB")
    planned = plan(dense, config, measure=True, estimate_seconds=False)
    report = prune(dense, tmp_path / "out", config)
    written, headers = size_of(tmp_path / "out"), 160 * len(load_file(dense / "model.safetensors"))
    step = 8 * 3 * 64 * item  # bytes of the smallest change of an FFN
    assert 1000 * most - step - headers < written <= 1000 * most
    weights = sum(
        tensor.nbytes for file in (tmp_path / "out").glob("*.safetensors") for tensor in load_file(file).values()
    )
    assert planned.bytes_after == weights
    assert report.requested == {"size": 1000 * most}


def test_a_size_is_kept_where_projections_differ_among_themselves(tmp_path, tiny_config):
    """What goes may all be of the smaller kind."""
    dense = write_mixed(tmp_path / "dense", "some projections")
    prune(dense, tmp_path / "out", tiny_config(ratio=0.25, schedule="nats", ffn_multiple=8, target_size="400kB"))
    assert 250_000 < size_of(tmp_path / "out") <= 400_000


def test_small_sizes_are_said_so_that_they_differ(tmp_path):
    dense = write_mixed(tmp_path / "dense", "embeddings")
    with pytest.raises(ValueError, match=r"target_size is 440\.0 kB; the model has 43\d\.\d kB: there is nothing"):
        plan(dense, PruneConfig(ffn_multiple=8, calibration="python", target_size="440kB"))
    with pytest.raises(ValueError, match=r"target_size is 100\.0 kB; the smallest .* reach is 1\d\d\.\d kB: ask"):
        plan(dense, PruneConfig(ffn_multiple=8, calibration="python", target_size="100kB"))


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
    with pytest.raises(ValueError, match=r"target_parameters is 10\.0 k; the smallest .* is (\S+) k: ask") as error:
        plan(large, config)
    smallest = str(error.value).split(" reach is ")[1].split(":")[0].replace(",", "")
    plan(large, replace(config, target_parameters=smallest), estimate_seconds=False)
    with pytest.raises(ValueError, match=r"target_size is 900\.0 GB; the model has \S+ MB: there is nothing to prune"):
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
