"""Record a sweep in MLflow: one run with a child for every model; the chosen one is registered."""

import dataclasses
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.environment import Workspace
from tasks.registry.client import open_client
from tasks.registry.config import RegistryConfig
from tasks.registry.names import RegisteredVersion
from tasks.registry.run_content import flat, log, source_tags
from tasks.registry.runs import RegistrationInput, experiment, record_run, recording
from tasks.registry.versions import publish
from tasks.sweep.comparing import Outcome


@task(name="record the sweep", cache_policy=NO_CACHE, persist_result=False)
def record_sweep(
    name: str,
    outcome: Outcome,
    runs: list[RegistrationInput],
    parameters: dict[str, Any],
    config: RegistryConfig,
    folder: Path,
    workspace: Workspace,
) -> RegisteredVersion | None:
    """One MLflow run for the sweep with a child for every model; the chosen one's is registered.

    Args:
        name: of the sweep's run.
        outcome: the chosen one is found among the runs by its title.
        runs: one for every pruned model.
        parameters: of the flow, nested.
        config: where it goes.
        folder: holds sweep.json and the plots.
        workspace: of the registry.

    Raises:
        ConnectionError: when the server does not answer, or stops answering; the alias has not moved.
    """
    client, chosen = open_client(workspace), outcome.chosen
    with recording(client, name, workspace) as begun:
        tags = {**source_tags("flows.sweep"), "mlflow.note.content": f"{len(runs)} models; {outcome.verdict}"}
        place = experiment(client, config.experiment, workspace)
        parent = client.create_run(place, run_name=config.run_name or name, tags=tags).info.run_id
        begun.runs.append(parent)
        log(client, parent, flat(parameters), [])
        for file in sorted(folder.iterdir()):
            client.log_artifact(parent, str(file), "plots" if file.suffix == ".svg" else None)
        for run in runs:
            child = dataclasses.replace(run, parent=parent)
            run_id = record_run(client, child, workspace, begun)
            if chosen is not None and run.title == chosen.title:
                best, best_id = child, run_id
        if chosen is None:
            begun.finish(client)
            return None
        version = publish(client, best_id, best, workspace, begun)
    get_run_logger().info("registered %s version %s: %s", version.name, version.version, chosen.title)
    return version
