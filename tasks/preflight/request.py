"""All that can be refused before any long work: names, servers, texts, disk; and what will be skipped."""

from dataclasses import dataclass
from typing import Literal

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from deploy.engines.availability import vllm_obstacle
from slimgpt.config import EvalConfig
from slimgpt.data.text import perplexity_text
from slimgpt.evaluation.harness_tasks import DataUsed, choose_tasks, load_tasks
from slimgpt.files import check_writable, scratch
from tasks.environment import Workspace
from tasks.registry.client import check_registrable, open_client
from tasks.registry.experiments import check_experiment
from tasks.registry.names import check_name

Skippable = Literal["evaluate", "benchmark"]
LEFT_OUT = "left out on request"


@dataclass(frozen=True)
class Preflight:
    """What is known before the work starts.

    Attributes:
        serving_obstacle: what keeps vLLM from serving here, in one line with the remedy; empty where it can.
        data: that the evaluation uses.
        skip: the stages that are left out on request.
    """

    serving_obstacle: str
    data: tuple[DataUsed, ...] = ()
    skip: tuple[Skippable, ...] = ()


@task(name="check the request", cache_policy=NO_CACHE, persist_result=False)
def check_request(
    name: str, evaluation: EvalConfig, workspace: Workspace, skip: tuple[Skippable, ...] = (), experiment: str = ""
) -> Preflight:
    """Refuse what cannot work: names, data, folders, a registry that does not answer, an experiment that was deleted.

    Nothing is checked for a stage that is left out (``skip``).

    Raises:
        ValueError, OSError: one line with the remedy.
    """
    check_name(name)
    check_writable(workspace.root)
    data = () if "evaluate" in skip else _data(evaluation)
    client = open_client(workspace)
    check_registrable(client, name)
    if experiment:
        check_experiment(client, experiment)
    if "benchmark" in skip:
        return Preflight(LEFT_OUT, data, skip)
    obstacle = vllm_obstacle()
    if obstacle:
        get_run_logger().warning("serving steps will be skipped: %s", obstacle)
    return Preflight(obstacle, data, skip)


def _data(evaluation: EvalConfig) -> tuple[DataUsed, ...]:
    """What the evaluation reads, loaded once: what is wrong with it would else be found after the pruning."""
    data: tuple[DataUsed, ...] = ()
    with scratch("slimgpt-check-") as place:
        if names := choose_tasks(evaluation.tasks):
            data += load_tasks(names, place, evaluation.num_fewshot)[1]
    if evaluation.perplexity != "none":
        text = perplexity_text(evaluation.perplexity)
        data += (DataUsed(name=text.name, origin=text.origin, sha256=text.sha256),)
    return data
