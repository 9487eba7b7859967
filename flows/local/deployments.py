"""What Prefect's server knows of this project: the work pool, the limit of the GPUs, the deployments.

Prefect is imported when a function runs: flows.local says before where its server is.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from deploy.serving.server import log_tail

POOL = "slimgpt"  # as prefect.yaml has it
GPU_TAG = "gpu"


def register(environment: dict[str, str], file: Path, log: Path, timeout_s: float) -> None:
    """Make or update the pool, the limit and all deployments of ``file``; schedules stay as users switched them.

    Raises:
        ValueError: as ``gpu_slots`` raises, before anything is made.
        OSError: when Prefect refuses one; the message ends with the last lines of ``log``.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker

    slots = gpu_slots()
    with get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template), overwrite=True)
        client.create_concurrency_limit(GPU_TAG, slots)
        switched = {place: active for place, (_, active) in _schedules(client).items()}
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        with log.open("wb") as output:
            code = subprocess.run(
                command, env=environment, cwd=file.parent, stdout=output, stderr=subprocess.STDOUT, timeout=timeout_s
            ).returncode
        if code:
            raise OSError(f"the deployments could not be registered; {log_tail(log)}")
        for place, (schedule, active) in _schedules(client).items():
            if switched.get(place, active) != active:
                client.update_deployment_schedule(place[0], schedule, active=switched[place])


def _schedules(client: Any) -> dict[tuple[Any, str], tuple[Any, bool]]:
    """(deployment, slug) -> (id, active)."""
    return {
        (deployment.id, schedule.slug): (schedule.id, schedule.active)
        for deployment in client.read_deployments()
        for schedule in deployment.schedules
    }


def forget_lost_runs(*, only_worker: bool) -> None:
    """Call crashed what the server believes to run while no worker does, and give back the GPUs it held.

    Args:
        only_worker: whether there are no others, on other machines; where there may be, nothing is done, and the
            server itself gives the GPUs back after a minute.
    """
    if not only_worker:
        return
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
    from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
    from prefect.client.schemas.objects import State, StateType
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Crashed

    under_way = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": under_way}}}),
            work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [POOL]}}),
        )
        for run in runs:
            lost: State[Any] = Crashed(message="The worker was killed; run it again to resume.")
            client.set_flow_run_state(run.id, lost, force=True)
        with contextlib.suppress(ObjectNotFound):  # the first start
            # Prefect 3.7's reset takes the leases back, after which nothing ever lowers the count of slots in use.
            client.reset_concurrency_limit_by_tag(GPU_TAG)
            free = GlobalConcurrencyLimitUpdate(active_slots=0)
            client.update_global_concurrency_limit(f"tag:{GPU_TAG}", free)


def gpu_slots() -> int:
    """Steps tagged ``gpu`` that may run together: SLIMGPT_GPU_SLOTS, else one for each NVIDIA GPU, else one.

    Raises:
        ValueError: when the variable holds no whole number of at least 1: with none, every such step waits for ever.
    """
    slots = os.environ.get("SLIMGPT_GPU_SLOTS", "")
    if slots and not (slots.isdecimal() and int(slots)):
        raise ValueError(f"SLIMGPT_GPU_SLOTS is {slots!r}; it must be a whole number of at least 1")
    return int(slots) if slots else max(1, sum(1 for _ in Path("/proc/driver/nvidia/gpus").glob("*")))
