"""Equal bits are asked of MKL before it computes, wherever a process of ours begins; what is in effect is known."""

import json
import os
import subprocess
import sys

import pytest
import torch

from deploy.serving.server import child_environment
from slimgpt.equal_bits import MKL_SETTINGS, conditions

pytestmark = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")

MODE = "from slimgpt.equal_bits import mkl_mode; print(mkl_mode())"
MULTIPLY = "import torch; torch.ones(300, 300) @ torch.ones(300, 300)"


def mode_after(*lines: str, **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in MKL_SETTINGS}
    command = [sys.executable, "-c", "\n".join([*lines, MODE])]
    done = subprocess.run(command, env=clean | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def strict() -> str:
    """What this CPU makes of the setting: some have no strict mode."""
    mode = mode_after(MULTIPLY, **MKL_SETTINGS)
    assert mode not in ("off", "", "unknown")
    return mode


@pytest.mark.parametrize(
    "begin", ["from slimgpt import prune", "from slimgpt import evaluate", "import torch; import slimgpt.engine"]
)
def test_the_library_asks_before_the_first_product(begin, strict):
    assert mode_after(begin, MULTIPLY) == strict


def test_where_torch_has_computed_before_it_is_off_and_a_users_own_mode_stays(strict):
    assert mode_after(MULTIPLY, "from slimgpt import prune") == "off"
    assert mode_after("from slimgpt import prune", MULTIPLY, MKL_CBWR="COMPATIBLE") not in ("off", strict)


def test_importing_the_package_or_its_models_changes_nothing(strict):
    assert mode_after("import slimgpt, slimgpt.modeling", MULTIPLY) == "off"


def test_vllm_gets_the_users_settings_and_not_ours(monkeypatch):
    monkeypatch.setenv("MKL_DYNAMIC", MKL_SETTINGS["MKL_DYNAMIC"])
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    env = child_environment()
    assert env["MKL_CBWR"] == "COMPATIBLE"
    assert "MKL_DYNAMIC" not in env


def test_a_gpus_results_depend_on_no_thread_of_the_cpu():
    on_cpu = conditions(torch.device("cpu"))
    assert on_cpu["threads"] == torch.get_num_threads()
    assert on_cpu["mkl"] != ""
    assert json.dumps(on_cpu)


def test_the_first_vector_function_of_a_process_is_as_exact_as_the_second():
    """Fails in one of four processes without that call: two threads let MKL choose a kernel together."""
    first_and_second = """
import torch
from slimgpt.equal_bits import settle_vector_functions
settle_vector_functions()
x = torch.linspace(0.01, 1, 16384)
assert torch.equal(x.log(), x.log())
"""
    for _ in range(4):  # one after the other, since the threads must be free to begin together
        done = subprocess.run([sys.executable, "-c", first_and_second], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
