"""Parameters as the form, a schedule and the API give them."""

import dataclasses

import pytest
from prefect.exceptions import ParameterTypeError

from flows.compress import compress
from flows.defaults import BENCH, EVALUATION, PRUNE, QUANTIZE, RECOVER, REGISTRY, check_quantization, check_recovery
from flows.sweep import sweep
from slimgpt.config import PruneConfig


def test_the_form_shows_descriptions_limits_and_defaults():
    schema = compress.parameters.model_dump()
    ratio = schema["definitions"]["PruneConfig"]["properties"]["ratio"]
    assert ratio["default"] == 0.25
    assert ratio["maximum"] == 0.9
    assert "projection parameters" in ratio["description"]
    assert schema["properties"]["model"]["description"].startswith("A folder, a GGUF file, a hub id")


@pytest.mark.parametrize("flow", [compress, sweep])
def test_a_section_with_one_key_keeps_the_flows_defaults_for_the_others(flow):
    """As of ``prefect deployment run --param 'prune={"ratio": 0.3}'``, a schedule, or the API."""
    given = {"prune": {"ratio": 0.3}, "evaluation": {"tasks": ["piqa"]}, "bench": {"pairs": 1}, "registry": {}}
    cast = flow.validate_parameters(given)
    assert cast["prune"] == dataclasses.replace(PRUNE, ratio=0.3)
    assert cast["evaluation"] == dataclasses.replace(EVALUATION, tasks=("piqa",))
    assert cast["bench"] == dataclasses.replace(BENCH, pairs=1)
    assert cast["registry"] == REGISTRY
    assert flow.validate_parameters({"recover": {"tokens": "2M"}})["recover"] == dataclasses.replace(
        RECOVER, tokens="2M"
    )
    whole = PruneConfig(ratio=0.2)  # from Python: taken as it is
    assert flow.validate_parameters({"prune": whole})["prune"] == whole


def test_settings_of_a_training_without_tokens_are_refused():
    with pytest.raises(ValueError, match="recover has settings and no tokens, so nothing would be trained"):
        check_recovery(dataclasses.replace(RECOVER, rank=4))
    check_recovery(RECOVER)


def test_settings_of_a_quantisation_without_a_scheme_are_refused():
    with pytest.raises(ValueError, match="quantize has settings and no scheme, so nothing would be quantised"):
        check_quantization(dataclasses.replace(QUANTIZE, num_samples=4))
    check_quantization(QUANTIZE)


def test_a_key_that_a_section_does_not_have_is_refused():
    with pytest.raises(ParameterTypeError, match="prune: .*ratoi is not known; known are ratio, target_size"):
        compress.validate_parameters({"prune": {"ratoi": 0.3}})
