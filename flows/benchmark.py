"""Measure two models against each other: the benchmark step of ``compress``, alone.

python -m flows.benchmark DENSE PRUNED
"""

import sys

from prefect import flow

from deploy.bench.results import BenchReport
from deploy.engines.availability import vllm_obstacle
from deploy.serving.server import ServerError
from flows.defaults import BENCH, BenchSection
from tasks.environment import prepare
from tasks.preflight.models import resolve
from tasks.preflight.request import Preflight
from tasks.registry.later_benchmark import find_version, record_benchmark
from tasks.steps.artifacts import publish_benchmark
from tasks.steps.benchmarking import benchmark as measure


@flow(name="benchmark", persist_result=False)
def benchmark(
    pruned: str,
    dense: str = "smollm2",
    bench: BenchSection = BENCH,
    record: bool = False,
    runs: str = "",
) -> BenchReport:
    """Serve a dense and a pruned model with vLLM, in turn under the same load, and compare them.

    Args:
        pruned: The pruned model: a folder, a hub id, models:/NAME@alias or runs:/RUN_ID.
        dense: The model to compare with, named the same way; smollm2 is built in.
        bench: The load that both models are measured under.
        record: Add the figures to the pruned model, a version in the registry, and to the run behind it.
        runs: Folder for the files of all runs; empty for ./runs or SLIMGPT_RUNS.

    Raises:
        ValueError: where vLLM cannot run; the message says what would make it work.
        ServerError: a server did not start, or did not do the work.
    """
    if reason := vllm_obstacle():
        raise ValueError(reason)
    workspace = prepare(runs)
    folder = workspace.run("benchmark", {"dense": dense, "pruned": pruned, "bench": bench})
    first, second = (resolve(model, "", workspace).folder for model in (dense, pruned))
    version = find_version(pruned, first, second, workspace) if record else None
    done = measure(first, second, bench, Preflight(serving_obstacle=""), folder)
    if done.report is None:
        raise ServerError(done.skipped)
    publish_benchmark(done.report, pruned)
    if version is not None:
        record_benchmark(version, done.report, folder.bench, workspace)
    return done.report


if __name__ == "__main__":
    benchmark(dense=sys.argv[1], pruned=sys.argv[2])
