"""All that can be refused before any long work: names, servers, texts, disk; and what will be skipped."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from deploy.engines.availability import vllm_obstacle
from slimgpt.config import EvalConfig
from slimgpt.data.text import perplexity_text
from slimgpt.evaluation.harness_tasks import DataUsed, choose_tasks, load_tasks
from tasks.environment import Workspace
from tasks.registry.client import open_client
from tasks.registry.names import check_name


@dataclass(frozen=True)
class Preflight:
    """What is known before the work starts.

    Attributes:
        serving_obstacle: what keeps vLLM from serving here, in one line with the remedy; empty where it can.
        data: that the evaluation uses.
    """

    serving_obstacle: str
    data: tuple[DataUsed, ...] = ()


@task(name="check the request", cache_policy=NO_CACHE, persist_result=False)
def check_request(name: str, evaluation: EvalConfig, workspace: Workspace) -> Preflight:
    """Refuse what cannot work: names, data, folders, a registry that does not answer.

    Raises:
        ValueError, OSError: one line with the remedy.
    """
    check_name(name)
    check_writable(workspace.root)
    data: tuple[DataUsed, ...] = ()
    with tempfile.TemporaryDirectory(prefix="slimgpt-check-", ignore_cleanup_errors=True) as scratch:
        if names := choose_tasks(evaluation.tasks):
            data += load_tasks(names, Path(scratch))[1]  # what is wrong would else be found after the pruning
    if evaluation.perplexity != "none":
        text = perplexity_text(evaluation.perplexity)
        data += (DataUsed(name=text.name, origin=text.origin, sha256=text.sha256),)
    open_client(workspace)
    obstacle = vllm_obstacle()
    if obstacle:
        get_run_logger().warning("serving steps will be skipped: %s", obstacle)
    return Preflight(obstacle, data)


def check_writable(folder: Path) -> None:
    """Make ``folder`` and try to write to it.

    Raises:
        OSError: naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}); choose another folder") from None
