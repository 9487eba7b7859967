"""The dry run predicts what pruning does."""

import subprocess

import pytest

from slimgpt.engine.plan import plan
from slimgpt.engine.pruner import prune


@pytest.mark.parametrize("unit", ["kv_group", "query"])
def test_planned_widths_equal_the_pruned_widths(dense, tmp_path, tiny_config, unit):
    config = tiny_config(head_unit=unit, head_budget="ratio")
    planned = plan(dense, config, tmp_path / "out")
    assert planned.missing == []
    report = prune(dense, tmp_path / "out", config)
    widths = [(x.num_attention_heads, x.num_key_value_heads, x.intermediate_size) for x in report.layers]
    assert [
        tuple(p["planned"][k] for k in ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
        for p in planned.layers
    ] == widths
    assert (planned.parameters_before, planned.parameters_after) == (report.parameters_before, report.parameters_after)
    assert planned.bytes_before == report.bytes_before
    assert planned.bytes_after == pytest.approx(report.bytes_after, rel=0.05)
    assert planned.calibration == report.calibration


def widths(report):
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    return [{name: getattr(layer, name) for name in names} for layer in report.layers]


def test_the_plan_gives_bounds_when_widths_depend_on_data(dense, tmp_path, tiny_config):
    planned = plan(dense, tiny_config(), tmp_path / "out")
    report = prune(dense, tmp_path / "out", tiny_config())
    assert planned.depends_on_data
    assert not planned.measured
    assert planned.ratio == pytest.approx(report.ratio, abs=0.005)
    assert planned.parameters_after == pytest.approx(report.parameters_after, rel=0.005)
    for layer, came_out in zip(planned.layers, widths(report), strict=True):
        assert all(layer["least"][name] <= value <= layer["most"][name] for name, value in came_out.items())


@pytest.mark.parametrize("place", ["auto", "disk"])
def test_a_measured_plan_has_the_pruned_widths_and_writes_nothing(dense, tmp_path, tiny_config, place):
    config = tiny_config(activations=place)
    seen = []
    planned = plan(dense, config, tmp_path / "out", measure=True, on_layer=lambda _, count: seen.append(count))
    assert seen == [4] * 4
    assert list(tmp_path.iterdir()) == []
    assert planned.measured
    assert not planned.depends_on_data
    report = prune(dense, tmp_path / "out", config)
    assert [layer["planned"] for layer in planned.layers] == widths(report)
    assert planned.parameters_after == report.parameters_after


def test_a_plan_measures_the_rate_only_on_request(dense, tiny_config):
    assert plan(dense, tiny_config(), estimate_seconds=False).seconds is None
    assert plan(dense, tiny_config()).seconds > 0


def test_a_dry_run_writes_nothing_and_lists_what_is_missing(dense, tmp_path, tiny_config):
    planned = plan(dense, tiny_config(calibration=str(tmp_path / "none.jsonl")), tmp_path / "out")
    assert len(planned.missing) == 1
    assert "none.jsonl" in planned.missing[0]
    assert not (tmp_path / "out").exists()


def test_the_memory_estimate_follows_tokens_and_not_depth(dense, tmp_path, tiny_config):
    from tests.tiny_models import write_dense

    few = plan(dense, tiny_config(num_samples=4)).memory_bytes
    many = plan(dense, tiny_config(num_samples=8)).memory_bytes
    deep = plan(write_dense(tmp_path / "deep", num_hidden_layers=8), tiny_config(num_samples=8)).memory_bytes
    assert few < many == deep


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(dense, tmp_path, tiny_config):
    """A real file system of 200 kB; the pruned model takes some 500."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root here: {mounted.stderr.strip()}")
    try:
        assert "GB free; the pruned model needs" in plan(dense, tiny_config(), disk / "out").missing[0]
        with pytest.raises(OSError, match="GB free; the pruned model needs"):
            prune(dense, disk / "out", tiny_config())
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_plan_by_prices_bounds_every_layer_and_refuses_what_the_narrowest_misses(dense, tiny_config):
    planned = plan(dense, tiny_config(schedule="nats", ratio=0.5, skip_last=1), estimate_seconds=False)
    first, last = planned.layers[0], planned.layers[-1]
    assert last["least"] == last["most"] == last["dense"]
    assert first["least"] == {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 4}
    assert first["most"] == first["dense"]
    with pytest.raises(ValueError, match=r"ratio 0.9 cannot be met: .* 64 channels in each layer give"):
        plan(dense, tiny_config(schedule="nats", ratio=0.9, ffn_multiple=64))
