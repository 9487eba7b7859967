"""Register a compression in MLflow: complete its run, log the model, make a version, set the alias ``challenger``.

The alias moves last: whoever follows ``models:/NAME@challenger`` never sees an incomplete version.
"""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.registry.client import explained, open_client
from tasks.registry.live_run import LiveRun
from tasks.registry.names import ALIAS, RegisteredVersion, check_name
from tasks.registry.runs import RegistrationInput, record_run
from tasks.registry.versions import publish


@task(name="register in MLflow", cache_policy=NO_CACHE, persist_result=False)
def register(request: RegistrationInput, run: LiveRun) -> RegisteredVersion:
    """Complete the run, upload the model, register a version, set the alias. It goes on where a try before it failed.

    Raises:
        ValueError: when the model cannot become a version yet; the message says what is missing.
        ConnectionError: when the server does not answer, or stops answering; the alias has not moved.
        OSError: when a disk of this machine is full; the alias has not moved.
    """
    check_name(request.name)
    open_client(run.workspace)
    with explained(f"{request.name} was registered", f"the alias {ALIAS} has not moved", run.workspace):
        record_run(run, request)
        version = publish(run, request)
    get_run_logger().info("registered %s version %s as %s", request.name, version.version, ALIAS)
    return version
