"""A version of a registered model: upload the checkpoint, register it, and let the alias point to it.

The alias moves last: whoever follows ``models:/NAME@challenger`` never sees an incomplete version.
"""

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.exceptions import MlflowException

from deploy.bundle.folder import MANIFEST
from slimgpt.files import folder_sha256
from slimgpt.report import REPORT
from tasks.registry.client import set_alias
from tasks.registry.live_run import LiveRun
from tasks.registry.logged_model import upload_model
from tasks.registry.names import ALIAS, CHECKSUM, LOCATION, RegisteredVersion
from tasks.registry.run_content import flat, tags_of
from tasks.registry.runs import RegistrationInput

MODEL_NAME = "model"  # of the logged model


def version_obstacle(request: RegistrationInput) -> str | None:
    """What keeps a model from becoming a version: it must be pruned, evaluated and packaged. None where it may.

    An evaluation that was left out on request is none that is missing.
    """
    if not (request.model / REPORT).is_file():
        return f"it is not pruned: {request.model} has no {REPORT}"
    if not request.without_evaluation:
        for side, result in (("dense", request.dense), ("pruned", request.pruned)):
            if result is None:
                return f"the {side} model is not evaluated"
    if not (request.model.parent / MANIFEST).is_file():
        return f"it is not packaged: {request.model.parent} has no {MANIFEST}"
    return None


def publish(run: LiveRun, request: RegistrationInput, top: LiveRun | None = None) -> RegisteredVersion:
    """Upload the model to a run that is complete, register a version, and, last of all, let the alias point to it.

    It may be called again after a fault: it goes on with the model and the version that are there.

    Args:
        run: the model's.
        request: the model, and what is known of it.
        top: the run that ``run`` is a part of; both are finished before the alias moves.

    Raises:
        ValueError: when the model cannot become a version yet.
        MlflowException, RequestException: when the server refuses, or does not answer.
    """
    if obstacle := version_obstacle(request):
        raise ValueError(f"{request.name} gets no version: {obstacle}")
    client, run_id = run.client, run.run_id
    tags = {**tags_of(request.report.comparison), CHECKSUM: folder_sha256(request.model)}
    copy = request.config.weights == "copy"
    if not copy:
        tags[LOCATION] = str(request.model.absolute())
    model_id = _logged_model(client, run_id, request, tags)
    if client.get_logged_model(model_id).status != LoggedModelStatus.READY:
        upload_model(client, run_id, model_id, request.model, copy=copy)
        client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    version = _create_version(client, run_id, model_id, request, tags)
    (top or run).finish()
    set_alias(client, request.name, ALIAS, version)
    return RegisteredVersion(request.name, version, ALIAS, run_id, model_id)


def _logged_model(client: MlflowClient, run_id: str, request: RegistrationInput, tags: dict[str, str]) -> str:
    """The id of the run's logged model: that of a try before this one, or a new one."""
    run = client.get_run(run_id)
    if run.outputs and run.outputs.model_outputs:
        return str(run.outputs.model_outputs[0].model_id)
    model_id = client.create_logged_model(
        run.info.experiment_id,
        MODEL_NAME,
        run_id,
        params=flat(request.parameters),
        model_type="causal-lm",
        tags=tags,
    ).model_id
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
    return str(model_id)


def _create_version(
    client: MlflowClient, run_id: str, model_id: str, request: RegistrationInput, tags: dict[str, str]
) -> str:
    """The number of the run's version: that of a try before this one, or a new one."""
    try:
        client.create_registered_model(request.name, description="Pruned by SlimGPT.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if existing := client.search_model_versions(f"name = '{request.name}' and run_id = '{run_id}'"):
        return str(existing[0].version)
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
