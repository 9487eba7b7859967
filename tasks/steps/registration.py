"""Register a compression in MLflow: one run that holds everything, one logged model, one version, ``challenger``.

The alias moves last: whoever follows ``models:/NAME@challenger`` never sees an incomplete version.
"""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from tasks.environment import Workspace
from tasks.registry.client import open_client
from tasks.registry.names import ALIAS, RegisteredVersion, check_name
from tasks.registry.runs import RegistrationInput, record_run, recording
from tasks.registry.versions import publish


@task(name="register in MLflow", cache_policy=NO_CACHE, persist_result=False)
def register(request: RegistrationInput, workspace: Workspace) -> RegisteredVersion:
    """Write the runs, upload the model, register a version, set the alias. What fails on the way is marked as failed.

    Raises:
        ConnectionError: when the server does not answer, or stops answering; the alias has not moved.
        OSError: when a disk of this machine is full; the alias has not moved.
    """
    check_name(request.name)
    client = open_client(workspace)
    with recording(client, request.name, workspace) as begun:
        version = publish(client, record_run(client, request, workspace, begun), request, workspace, begun)
    get_run_logger().info("registered %s version %s as %s", request.name, version.version, ALIAS)
    return version
