"""Serve dense and pruned with vLLM and measure them in turn; skipped with one line where vLLM cannot run."""

from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from deploy.bench.config import BenchConfig
from deploy.bench.paired import compare
from deploy.bench.results import BenchReport
from deploy.report.comparison import bench_note, bench_rows
from deploy.serving.server import ServerError
from tasks.environment import RunFolder
from tasks.preflight.request import Preflight
from tasks.registry.live_run import LiveRun


@dataclass(frozen=True)
class Benchmark:
    """The benchmark, or why there is none.

    Args:
        report: None where it was skipped, or failed.
        skipped: for the report: why there is none.
        failed: what failed; empty where nothing did.
    """

    report: BenchReport | None
    skipped: str = ""
    failed: str = ""


@task(name="benchmark", tags=["gpu"], cache_policy=NO_CACHE, persist_result=False)
def benchmark(
    dense: Path, pruned: Path, config: BenchConfig, ready: Preflight, folder: RunFolder, run: LiveRun | None = None
) -> Benchmark:
    """Throughput and latency of both, as ratios with their spread; they also go to the MLflow ``run``.

    A server that fails costs the benchmark, not the flow: the reason is returned.
    """
    logger = get_run_logger()
    if ready.serving_obstacle:
        logger.warning("benchmark skipped: %s", ready.serving_obstacle)
        return Benchmark(None, f"benchmark: {ready.serving_obstacle}")
    try:
        report = compare(dense, pruned, config, workdir=folder.bench, on_progress=lambda line: logger.info("%s", line))
    except ServerError as error:  # hours of pruning and evaluation must not be lost for want of a speed
        logger.error("the benchmark failed, and the model is registered without it: %s", error)
        reason = str(error).splitlines()[0]
        return Benchmark(None, f"benchmark: it failed ({reason})", failed=reason)
    if run is not None:
        run.log_benchmark(report)
    table = [row.to_dict() for row in bench_rows(report)]
    create_table_artifact(table, key="compress-benchmark", description=bench_note(report))
    return Benchmark(report)
