"""What the points of a sweep run on: threads of this process, or Dask's workers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from tasks.sweep.config import SweepConfig


def runner_of(grid: SweepConfig) -> TaskRunner[Any]:
    """Prefect's task runner for the points.

    Raises:
        ValueError: when the runner is dask and prefect-dask is not installed.
    """
    if grid.runner == "threads":
        return ThreadPoolTaskRunner(max_workers=grid.workers)
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError:
        raise ValueError(
            "runner is 'dask', and prefect-dask is not installed; pip install 'slimgpt[team]', or use threads"
        ) from None
    if grid.dask_scheduler:
        return DaskTaskRunner(address=grid.dask_scheduler)
    # Dask would give each process one thread for its products. The number is among the facts a pruning is known by.
    threads = str(max(1, torch.get_num_threads() // grid.workers))
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    processes = {"n_workers": grid.workers, "threads_per_worker": 1, "processes": True}
    return DaskTaskRunner(cluster_kwargs={**processes, "env": environment})


@contextmanager
def own_environment() -> Iterator[None]:
    """Restore os.environ at the end: Dask limits BLAS to one thread here, which vLLM would inherit later."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for variable in os.environ.keys() - before.keys():
            del os.environ[variable]
        os.environ.update(before)
