"""Every limit of the config is checked on construction, and the message names value, limit and meaning."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slimgpt.config import EvalConfig, PruneConfig, RecoverConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 1.2}, "ratio is 1.2; it must be at most 0.9"),
        ({"ratio": -0.1}, "ratio is -0.1; it must be at least 0"),
        ({"ratio": float("nan")}, "ratio is nan; it must be a finite number"),
        ({"ratio": "a"}, "ratio is 'a'; it must be a finite number"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"num_samples": 2.5}, "num_samples is 2.5; it must be an integer"),
        ({"schedule": "cubic"}, "schedule is 'cubic'; it must be one of nats, log, linear, uniform, log_decreasing"),
        ({"schedule": "explicit"}, "layer_ratios belongs to schedule='explicit'"),
        ({"layer_ratios": (0.5,)}, "layer_ratios belongs to schedule='explicit'"),
        (
            {"head_error": "paper"},
            "schedule is 'nats' and head_error 'paper'; with prices it is 'exact': choose schedule",
        ),
        ({"head_error": "diagonal"}, "schedule is 'nats' and head_error 'diagonal'; with prices it is 'exact'"),
        ({"head_error": "initial"}, "head_error is 'initial'; it must be one of exact, paper, diagonal"),
        ({"first_ratio_share": 0.5}, "first_ratio_share 0.5; it belongs to the schedules log and linear and the decr"),
        ({"head_budget": "ratio"}, "head_budget 'ratio'; with prices it is 'price'"),
        ({"schedule": "explicit", "layer_ratios": (0.5, 0.95)}, r"layer_ratios\[1\] is 0.95"),
        (
            {"schedule": "explicit", "layer_ratios": (0.2, 0.3), "skip_first": 1},
            "skip_first is 1 and schedule 'explicit', whose layer_ratios say .*: leave skip_first out, and give 0",
        ),
        (
            {"schedule": "explicit", "layer_ratios": (0.2, 0.3), "skip_last": 1},
            "skip_last is 1 and schedule 'explicit'",
        ),
        ({"layer_ratios": 0.25}, "layer_ratios is 0.25; it must be a list of numbers"),
        ({"layer_ratios": None}, "layer_ratios is None; it must be a list of numbers"),
        ({"layer_ratios": "0.2,0.3"}, "layer_ratios is '0.2,0.3'; it must be a list of numbers"),
        ({"layer_ratios": ["0.2"]}, r"layer_ratios is \['0.2'\]; it must be a list of numbers"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be at most"),
        ({"group_size_min": 64, "group_size_max": 8}, "group_size_min .64. is larger than group_size_max .8."),
        ({"percdamp": -1}, "percdamp is -1; it must be at least 0"),
        ({"percdamp": "1e-2"}, "percdamp is the text '1e-2'; write the number 0.01"),  # what YAML makes of 1e-2
        ({"device": torch.device("cpu")}, "device is device.type='cpu'.; it must be a text"),
        ({"calibration": None}, "calibration is None; it must be a text"),
        ({"num_samples": True}, "num_samples is True; it must be a finite number"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**fields)


def test_what_json_cannot_hold_is_made_a_value_that_it_can():
    config = PruneConfig(calibration=Path("folder/text.txt"), num_samples=8.0)
    assert (config.calibration, config.num_samples) == (str(Path("folder/text.txt")), 8)
    assert isinstance(config.num_samples, int)
    json.dumps(config.to_dict())


def test_numbers_of_numpy_become_pythons_own():
    """They reach a config from a computation, and json takes few of them: known only when the model was pruned."""
    ratios = np.full(2, 0.25, dtype=np.float32)
    config = PruneConfig(
        schedule="explicit", layer_ratios=ratios, ratio=np.float32(0.25), num_samples=np.int64(8), percdamp=np.int32(0)
    )
    assert config == PruneConfig(schedule="explicit", layer_ratios=(0.25, 0.25), num_samples=8, percdamp=0)
    json.dumps(config.to_dict())


def test_a_whole_number_is_a_quantity_also_without_quotes():
    """YAML reads ``tokens: 131072`` as a number."""
    assert RecoverConfig(tokens=131072) == RecoverConfig(tokens="131072")
    assert PruneConfig(target_parameters=200_000).target == ("target_parameters", 200_000)
    with pytest.raises(ValueError, match="target_size is '200000000'; it must be a number and kB, MB, GB or TB"):
        PruneConfig(target_size=200_000_000).target  # noqa: B018


def test_a_seed_that_training_cannot_take_is_refused_at_once():
    with pytest.raises(ValueError, match="seed is 20261129181023; it must be at most 4294967295"):
        RecoverConfig(seed=20261129181023)


def test_a_teacher_of_a_method_that_has_none_is_refused():
    with pytest.raises(ValueError, match="method is 'lora' and teacher big; it learns from answers and not from a tea"):
        RecoverConfig(method="lora", teacher="big")


@pytest.mark.parametrize("tasks", [None, 5, ["piqa", 5], [None]])
def test_tasks_that_are_no_names_are_refused(tasks):
    with pytest.raises(ValueError, match="tasks is .*; it must be a list of names"):
        EvalConfig(tasks=tasks)


@pytest.mark.parametrize(("given", "limit"), [(0.1, 0.1), (3.0, 3), (0, 0), (1, 1)])
def test_a_limit_is_a_number_of_documents_or_a_share(given, limit):
    assert EvalConfig(limit=given).limit == limit
    assert type(EvalConfig(limit=given).limit) is type(limit)


def test_a_limit_between_two_numbers_of_documents_is_refused():
    with pytest.raises(ValueError, match="limit is 2.5; it must be a whole number of documents, or a share below 1"):
        EvalConfig(limit=2.5)


def test_every_field_has_a_description_for_help_and_forms():
    for field in dataclasses.fields(PruneConfig):
        assert field.metadata["description"].strip(), field.name


def test_a_config_round_trips_through_json():
    config = PruneConfig(ratio=0.3, schedule="explicit", layer_ratios=(0.2, 0.4))
    assert PruneConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
