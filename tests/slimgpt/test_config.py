"""Every limit of the config is checked on construction, and the message names value, limit and meaning."""

import dataclasses
import json

import pytest

from slimgpt.config import PruneConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 1.2}, "ratio is 1.2; it must be at most 0.9"),
        ({"ratio": -0.1}, "ratio is -0.1; it must be at least 0"),
        ({"ratio": float("nan")}, "ratio is nan; it must be a finite number"),
        ({"ratio": "a"}, "ratio is 'a'; it must be a finite number"),
        ({"num_samples": 0}, "num_samples is 0; it must be at least 1"),
        ({"num_samples": 2.5}, "num_samples is 2.5; it must be an integer"),
        ({"schedule": "cubic"}, "schedule is 'cubic'; it must be one of log, linear, uniform, explicit"),
        ({"schedule": "explicit"}, "layer_ratios belongs to schedule='explicit'"),
        ({"layer_ratios": (0.5,)}, "layer_ratios belongs to schedule='explicit'"),
        ({"schedule": "explicit", "layer_ratios": (0.5, 0.95)}, r"layer_ratios\[1\] is 0.95"),
        ({"group_size_min": 64, "group_size_max": 8}, "group_size_min .64. is larger than group_size_max .8."),
        ({"percdamp": -1}, "percdamp is -1; it must be at least 0"),
    ],
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(**fields)


def test_every_field_has_a_description_for_help_and_forms():
    for field in dataclasses.fields(PruneConfig):
        assert field.metadata["description"].strip(), field.name


def test_a_config_round_trips_through_json():
    config = PruneConfig(ratio=0.3, schedule="explicit", layer_ratios=(0.2, 0.4))
    assert PruneConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
