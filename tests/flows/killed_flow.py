"""``slimgpt compress`` in a process that kills itself. A moment is a phase of the flow and a call of Python in it."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import mlflow.system_metrics.system_metrics_monitor  # noqa: F401

# What the flow imports late, imported once for all processes that are forked from here.
import prefect.flow_engine
import prefect.task_engine  # noqa: F401
from mlflow import MlflowClient
from mlflow.store.db import utils as mlflow_database
from prefect.settings import PREFECT_API_URL, temporary_settings

import flows.prefect_api  # noqa: F401
from flows.cli import app as cli
from tasks.preflight import models, planning
from tasks.registry import live_run, runs, versions
from tasks.steps import artifacts, benchmarking, bundling, chain, evaluation, reporting
from tests import processes

# Where each phase begins, in the order in which they come.
PHASES = {
    "database": mlflow_database._initialize_tables.__code__,
    "find": models.resolve.fn.__code__,
    "plan": planning.plan_pruning.fn.__code__,
    "open": live_run.mark_killed.__code__,
    "prune": chain.run_chain.__code__,
    "evaluate": evaluation.evaluate_model.__code__,
    "package": bundling.package.fn.__code__,
    "benchmark": benchmarking.benchmark.fn.__code__,
    "report": reporting.write_report.fn.__code__,
    "run": runs.record_run.__code__,
    "upload": versions.upload_model.__code__,
    "version": versions._create_version.__code__,
    "finish": live_run.LiveRun.finish.__code__,
    "alias": MlflowClient.set_registered_model_alias.__code__,
    "show": artifacts.publish_artifacts.fn.__code__,
}
ORDER = {phase: i for i, phase in enumerate(PHASES)}
BEGINS = {code: phase for phase, code in PHASES.items()}


def count_calls(kill_in: str = "", at_call: int = 0) -> dict[str, int]:
    """From now on count the main thread's calls in each phase, and end at one of them by SIGKILL."""
    calls = dict.fromkeys(PHASES, 0)
    now = ""

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal now
        if event != "call":
            return
        now = BEGINS.get(frame.f_code, now)
        if not now:
            return
        calls[now] += 1
        # The phase may be shorter than it was when it was measured.
        if kill_in and ((now == kill_in and calls[now] >= at_call) or ORDER[now] > ORDER[kill_in]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    return calls


def compress(words: list[str], api: str, log: Path, vllm: bool, kill_in: str, at_call: int, answer: Any) -> None:
    """Run it; where it is not killed, answer the calls of each phase."""
    os.setsid()  # what it starts is known by the session, or by a variable
    os.environ["SLIMGPT_TEST_FLOW"] = str(os.getpid())
    del os.environ["MLFLOW_TRACKING_URI"]  # the tests' own; the flow takes that of its workspace
    processes.write_output_to(log)
    if not vllm:
        sys.modules["vllm"] = None  # type: ignore[assignment]  # this machine has none
    sys.argv = ["slimgpt", "compress", *words]
    with temporary_settings({PREFECT_API_URL: api}):
        calls = count_calls(kill_in, at_call)
        try:
            cli.main()
        finally:
            sys.setprofile(None)
            answer.put(calls)
