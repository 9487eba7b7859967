"""``import slimgpt``: light, complete, and without effect on transformers."""

import json
import subprocess
import sys

import pytest

import slimgpt


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_settings_and_reports_do_not_import_torch():
    code = """
import json, sys
import slimgpt
from slimgpt import EvalConfig, PruneConfig, load_report
print(json.dumps([name for name in ("torch", "transformers", "datasets") if name in sys.modules]))
"""
    assert in_a_new_process(code) == []


def test_the_public_names_are_exactly_those_listed():
    assert set(slimgpt.__all__) <= set(dir(slimgpt))
    for name in slimgpt.__all__:
        assert getattr(slimgpt, name).__name__ == name
    with pytest.raises(AttributeError, match="'slimgpt' has no attribute 'pruner'"):
        slimgpt.pruner  # noqa: B018


def test_importing_modeling_registers_pruned_models_and_importing_slimgpt_does_not():
    code = """
import json
from transformers import CONFIG_MAPPING
import slimgpt
before = "slim_llama" in CONFIG_MAPPING
import slimgpt.modeling
print(json.dumps([before, sorted(name for name in CONFIG_MAPPING.keys() if name.startswith("slim_"))]))
"""
    from slimgpt.checkpoints.families import FAMILIES

    assert in_a_new_process(code) == [False, sorted(family.slim for family in FAMILIES)]
