"""Widths chosen by prices: the budget, the choice against every other, the cache, a killed run, several processes."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from slimgpt.checkpoints.source import cache_folder
from slimgpt.config import PruneConfig
from slimgpt.engine import prices
from slimgpt.engine.chosen import Chosen
from slimgpt.engine.job import Job
from slimgpt.engine.plan import plan
from slimgpt.engine.prices import priced
from slimgpt.engine.pruner import prune
from slimgpt.engine.ranks import Ranks

from .test_ranks import _prune, in_two_processes
from .test_resume import interrupted, model_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMGPT_CACHE", str(tmp_path / "cache"))


def chosen(dense, config):
    job = Job(dense, config)
    with torch.inference_mode():
        return job, Chosen(priced(job, job.calibration(), Ranks(), None), job.config, job.shapes)


def shapes_of(report):
    return [(x.num_attention_heads, x.num_key_value_heads, x.intermediate_size) for x in report.layers]


@pytest.mark.parametrize("fields", [{}, {"targets": "ffn"}, {"targets": "attention", "ratio": 0.2}, {"skip_first": 2}])
def test_the_budget_is_met_by_the_chosen_widths_and_the_rest_is_untouched(dense, tmp_path, tiny_config, fields):
    config = tiny_config(schedule="nats", **fields)
    report = prune(dense, tmp_path / "out", config)
    job, plan = chosen(dense, config)
    assert shapes_of(report) == [(o.num_heads, o.num_kv_heads, w) for o, w in zip(plan.heads, plan.widths, strict=True)]
    smallest = 4 * 3 * 64 if config.targets != "attention" else job.shapes[0].heads.cost(1, 1)
    step = smallest / sum(shape.parameters for shape in job.shapes)
    assert config.ratio <= report.ratio <= config.ratio + step
    for i, (shape, layer) in enumerate(zip(job.shapes, report.layers, strict=True)):
        if config.targets == "ffn" or i < config.skip_first:
            assert layer.num_attention_heads == shape.num_heads
        if config.targets == "attention" or i < config.skip_first:
            assert layer.intermediate_size == shape.intermediate_size


def test_heads_that_count_for_more_stay(dense, tiny_config):
    kept = [
        sum(o.num_heads for o in chosen(dense, tiny_config(schedule="nats", head_price_factor=factor))[1].heads)
        for factor in (0.1, 1e9)
    ]
    assert kept[0] < kept[1] == 4 * 8


def test_no_more_layouts_of_heads_than_asked_for_and_the_budget_is_met(dense, tiny_config):
    config = tiny_config(schedule="nats", ratio=0.5, head_price_factor=1.0, device="cpu")  # a GPU draws other prices
    layouts = []
    for most in (8, 2, 1):
        job, plan = chosen(dense, replace(config, max_head_shapes=most))
        layouts.append({(o.num_heads, o.num_kv_heads) for o in plan.heads})
        after = [
            replace(shape, num_heads=o.num_heads, num_kv_heads=o.num_kv_heads, intermediate_size=width)
            for shape, o, width in zip(job.shapes, plan.heads, plan.widths, strict=True)
        ]
        assert sum(x.parameters for x in after) <= 0.5 * sum(x.parameters for x in job.shapes)
    assert len(layouts[0]) > 2 >= len(layouts[1]) > len(layouts[2]) == 1


def test_layouts_that_a_pruned_model_has_already_do_not_count(dense, tmp_path, tiny_config):
    first = prune(dense, tmp_path / "first", tiny_config(schedule="log", ratio=0.5, head_budget="ratio"))
    had = {(x.num_attention_heads, x.num_key_value_heads) for x in first.layers}
    second = prune(tmp_path / "first", tmp_path / "second", tiny_config(schedule="nats", ratio=0.1, max_head_shapes=1))
    assert len({(x.num_attention_heads, x.num_key_value_heads) for x in second.layers}) <= len(had) > 1


def test_another_ratio_finds_the_prices_in_the_cache_and_costs_more(dense, tiny_config):
    _, some = chosen(dense, tiny_config(schedule="nats", ratio=0.2))
    [folder] = (cache_folder() / "prices").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    _, more = chosen(dense, tiny_config(schedule="nats", ratio=0.4))
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert 0 < some.nats < more.nats


def test_the_same_weights_under_another_config_have_prices_of_their_own(copy, tiny_config):
    chosen(copy, tiny_config(schedule="nats"))
    data = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**data, "rms_norm_eps": 0.05}))
    chosen(copy, tiny_config(schedule="nats"))
    assert len(list((cache_folder() / "prices").iterdir())) == 2


@pytest.mark.parametrize("damage", ["table", "no layers", "another's layers", "roots", "a file less"])
def test_damaged_prices_are_made_again(dense, tiny_config, damage):
    config = tiny_config(schedule="nats")
    _, before = chosen(dense, config)
    [folder] = (cache_folder() / "prices").iterdir()
    digest = before.prices.digest()
    table, shard = folder / "prices.json", folder / "layer-00001.safetensors"
    if damage == "a file less":
        shard.unlink()
    elif "layers" in damage:
        layers = [] if damage == "no layers" else [{"heads": 1}]
        table.write_text(json.dumps({**json.loads(table.read_text()), "layers": layers}))
    else:
        path = table if damage == "table" else shard
        path.write_bytes(path.read_bytes()[:100])
    _, after = chosen(dense, config)
    assert (after.prices.digest(), after.planned) == (digest, before.planned)


def test_a_cache_without_room_for_the_prices_is_refused_before_they_are_made(
    dense, tmp_path, tiny_config, small_disk, monkeypatch
):
    config, out = tiny_config(schedule="nats"), tmp_path / "out"
    with small_disk("64k") as disk:
        monkeypatch.setenv("SLIMGPT_CACHE", str(disk / "cache"))
        message = r"prices of this model need .* GB there: set SLIMGPT_CACHE to another folder"
        with pytest.raises(OSError, match=message):
            prune(dense, out, config)
        assert any(re.search(message, line) for line in plan(dense, config, out).missing)


def test_prices_come_from_a_bounded_number_of_tokens_of_every_part_of_the_text(dense, tiny_config, monkeypatch):
    """The texts of a mixture stand one after the other."""
    monkeypatch.setattr("slimgpt.engine.cost.PRICE_TOKENS", 4 * 64)
    job = Job(dense, tiny_config(schedule="nats", num_samples=8))
    ids_NT = job.calibration().ids_NT
    with torch.inference_mode():
        made = priced(job, job.calibration(), Ranks(), None).digest()
        few = replace(job.calibration(), ids_NT=ids_NT[[0, 2, 4, 6]])
        shutil.rmtree(cache_folder())
        assert priced(job, few, Ranks(), None).digest() == made
        shutil.rmtree(cache_folder())
        assert priced(job, replace(few, ids_NT=ids_NT[:4]), Ranks(), None).digest() != made


def test_progress_counts_the_layers_that_get_prices_and_none_where_the_cache_has_them(dense, tmp_path, tiny_config):
    said = []
    for name in ("a", "b"):
        prune(dense, tmp_path / name, tiny_config(schedule="nats"), on_priced=lambda *counts: said.append(counts))
    assert said == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_interrupted_run_goes_on_with_its_plan_and_the_same_bits(dense, tmp_path, tiny_config):
    config = tiny_config(schedule="nats")
    prune(dense, tmp_path / "whole", config)
    interrupted(dense, tmp_path / "out", config)
    assert prune(dense, tmp_path / "out", config).replayed_layers == 2
    assert model_files(tmp_path / "out") == model_files(tmp_path / "whole")


def test_an_interrupted_run_whose_prices_are_gone_and_come_out_otherwise_is_refused(dense, tmp_path, tiny_config):
    config = tiny_config(schedule="nats")
    interrupted(dense, tmp_path / "out", config)
    [table] = (cache_folder() / "prices").glob("*/prices.json")
    data = json.loads(table.read_text())
    data["layers"][0]["widths"][1][1] *= 1.5
    table.write_text(json.dumps(data))
    with pytest.raises(FileExistsError, match="was begun with other prices"):
        prune(dense, tmp_path / "out", config)


def test_a_run_killed_while_it_makes_prices_leaves_none_and_the_next_makes_them(
    dense, tmp_path, tiny_config, monkeypatch
):
    config = tiny_config(schedule="nats")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("slimgpt.engine.prices.channel_prices", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(dense, tmp_path / "out", config)
    assert not list((cache_folder() / "prices").glob("*/prices.json"))
    assert prune(dense, tmp_path / "out", config).ratio >= config.ratio


def test_two_processes_choose_alike_each_time(dense, tmp_path, tiny_config):
    config = tiny_config(schedule="nats")
    for name in ("a", "b"):
        assert in_two_processes(tmp_path, _prune, dense, tmp_path / name, config) == [(2, 0), (2, 0)]
    assert model_files(tmp_path / "a") == model_files(tmp_path / "b")


def test_a_pruned_model_is_priced_and_pruned_again(dense, tmp_path, tiny_config):
    prune(dense, tmp_path / "first", tiny_config(ratio=0.2))
    report = prune(tmp_path / "first", tmp_path / "second", tiny_config(schedule="nats", ratio=0.2))
    assert 0.2 <= report.ratio < 0.21


def test_a_budget_in_parameters_is_kept(dense, tmp_path):
    config = PruneConfig(
        schedule="nats", target_parameters="140k", calibration="python", num_samples=8, seq_len=64, ffn_multiple=4
    )
    report = prune(dense, tmp_path / "out", config)
    assert 138_000 < report.parameters_after <= 140_000


def prune_far_from_the_first(rank, dense, out, config):
    """The second process is on another machine: the cache of the first is not there."""
    if rank:
        prices.load_file = None
    return _prune(rank, dense, out, config)


def test_only_the_process_that_decides_reads_the_cache(dense, tmp_path, tiny_config):
    config = tiny_config(schedule="nats")
    assert in_two_processes(tmp_path, prune_far_from_the_first, dense, tmp_path / "out", config) == [(2, 0), (2, 0)]
