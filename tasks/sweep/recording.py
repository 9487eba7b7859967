"""Complete a sweep in MLflow: its run, the child run of every model, and a version of the chosen one."""

from pathlib import Path

from mlflow.entities import RunTag
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.registry.client import explained, open_client
from tasks.registry.live_run import LiveRun
from tasks.registry.names import ALIAS, RegisteredVersion
from tasks.registry.runs import RegistrationInput, record_run
from tasks.registry.versions import publish
from tasks.sweep.comparing import Outcome
from tasks.sweep.points import Tried


@task(name="record the sweep", cache_policy=NO_CACHE, persist_result=False)
def record_sweep(
    outcome: Outcome, tried: list[Tried], inputs: dict[str, RegistrationInput], folder: Path, run: LiveRun
) -> RegisteredVersion | None:
    """Complete the run of the sweep and those of its models; the chosen model is registered.

    Args:
        outcome: with the chosen model, by its title.
        tried: every pruned model, with its run.
        inputs: what is recorded of each, by its title.
        folder: holds sweep.json and the plots.
        run: of the sweep.

    Raises:
        ConnectionError: when the server does not answer, or stops answering; the alias has not moved.
        OSError: when a disk of this machine is full; the alias has not moved.
    """
    client, chosen = open_client(run.workspace), outcome.chosen
    with explained("the sweep was recorded", f"the alias {ALIAS} has not moved", run.workspace):
        note = f"{len(tried)} models; {outcome.verdict}"
        client.log_batch(run.run_id, tags=[RunTag("mlflow.note.content", note)])
        for file in sorted(folder.iterdir()):
            client.log_artifact(run.run_id, str(file), "plots" if file.suffix == ".svg" else None)
        for one in tried:
            record_run(one.run, inputs[one.point.title])
        if chosen is None:
            run.finish()
            return None
        best = next(one for one in tried if one.point.title == chosen.title)
        version = publish(best.run, inputs[chosen.title], top=run)
    get_run_logger().info("registered %s version %s: %s", version.name, version.version, chosen.title)
    return version
