"""A version of a registered model: upload the checkpoint, register it, and let the alias point to it.

The alias moves last: whoever follows ``models:/NAME@challenger`` never sees an incomplete version.
"""

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException

from slimgpt.files import folder_sha256
from tasks.environment import Workspace
from tasks.registry.client import set_alias
from tasks.registry.logged_model import upload_model
from tasks.registry.names import ALIAS, CHECKSUM, LOCATION, RegisteredVersion
from tasks.registry.run_content import flat, tags_of
from tasks.registry.runs import Begun, RegistrationInput, experiment

MODEL_NAME = "model"  # of the logged model


def publish(
    client: MlflowClient, run_id: str, request: RegistrationInput, workspace: Workspace, begun: Begun
) -> RegisteredVersion:
    """Upload the model to a run that is written, register a version, and, last of all, let the alias point to it."""
    tags = {**tags_of(request.report.comparison), CHECKSUM: folder_sha256(request.model)}
    copy = request.config.weights == "copy"
    if not copy:
        tags[LOCATION] = str(request.model.absolute())
    begun.model_id = client.create_logged_model(
        experiment(client, request.config.experiment, workspace),
        MODEL_NAME,
        run_id,
        params=flat(request.parameters),
        model_type="causal-lm",
        tags=tags,
    ).model_id
    client.log_outputs(run_id, [LoggedModelOutput(begun.model_id, step=0)])
    upload_model(client, run_id, begun.model_id, request.model, copy=copy)
    client.finalize_logged_model(begun.model_id, LoggedModelStatus.READY)
    version = _create_version(client, run_id, begun.model_id, request, tags)
    begun.finish(client)
    set_alias(client, request.name, ALIAS, version)
    return RegisteredVersion(request.name, version, ALIAS, run_id, begun.model_id)


def _create_version(
    client: MlflowClient, run_id: str, model_id: str, request: RegistrationInput, tags: dict[str, str]
) -> str:
    try:
        client.create_registered_model(request.name, description="Pruned by SlimGPT.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        request.name,
        f"models:/{model_id}",
        run_id,
        tags=tags,
        description=request.description,
        model_id=model_id,
        await_creation_for=120,
    )
    return str(version.version)
