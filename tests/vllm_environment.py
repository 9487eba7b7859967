"""How vLLM is started by tests that are about something else: sooner, and beside other tests.

By default on a CPU, vLLM takes cores for itself (two at once would take the same ones) and computes in a process apart
from its engine's, whose imports take seconds. ``as_users_have_it`` gives a test of the start itself the default back.
"""

from collections.abc import Mapping

QUICK = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def as_users_have_it(environment: Mapping[str, str]) -> dict[str, str]:
    """These variables without ours."""
    return {name: value for name, value in environment.items() if name not in QUICK}
