"""Register a compression in MLflow: one run that holds everything, one logged model, one version, ``challenger``.

The alias moves last: whoever follows ``models:/NAME@challenger`` never sees a version that is not whole.
"""

import dataclasses
import json
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, LoggedModelStatus, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

import deploy
import slimgpt
from deploy.bench_report import BenchReport
from slimgpt.harness import EvalResult
from slimgpt.report import REPORT, PruneReport
from tasks.environment import RunFolder, Workspace
from tasks.registry import ALIAS, MODEL_PATH, RegisteredVersion, check_name, fetch_model, open_client
from tasks.reporting import Report

__all__ = ["RegisteredVersion", "RegistrationInput", "fetch_model", "register"]

EXPERIMENT = "slimgpt"
MODEL_NAME = "model"  # of the logged model
_LAYER_METRICS = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "attention_error",
    "ffn_error",
    "ratio",
    "seconds",
)


@dataclass(frozen=True)
class RegistrationInput:
    """What one MLflow run is made of.

    Args:
        model: the pruned checkpoint's folder, as it is to be served.
        parameters: nested; flattened to ``prune.ratio`` and the like.
        dense, pruned: the evaluations.
        report: the report: its title is the registered name.
        folder: the run's folder: bench.json and evaluation-*.json go up with the report.
    """

    model: Path
    parameters: dict[str, Any]
    dense: EvalResult
    pruned: EvalResult
    report: Report
    folder: RunFolder

    @property
    def name(self) -> str:
        """Of the registered model."""
        return self.report.comparison.title

    @property
    def pruning(self) -> PruneReport:
        """What pruning did."""
        return self.report.comparison.pruning

    @property
    def bench(self) -> BenchReport | None:
        """The benchmark, or None where it was skipped."""
        return self.report.comparison.bench

    @property
    def files(self) -> dict[str, list[Path]]:
        """Artifact folder -> local files."""
        facts = [self.model / REPORT, self.folder.bench / "bench.json"]
        facts += [self.folder.root / f"evaluation-{side}.json" for side in ("dense", "pruned")]
        if self.bench is None:
            facts.remove(self.folder.bench / "bench.json")  # an older run's
        return {"": [self.report.html, self.report.markdown, *facts], "plots": self.report.plots}

    @property
    def data(self) -> list[DatasetInput]:
        """Every text and data set, with its digest and what it was used for."""
        calibration = self.pruning.calibration
        used = [(calibration["name"], calibration["sha256"], calibration.get("origin", ""), "calibration")]
        used += [(text.name, text.sha256, text.origin, "evaluation") for text in self.dense.texts]
        return [_dataset(*item) for item in used]


@task(name="register in MLflow", cache_policy=NO_CACHE, persist_result=False)
def register(asked: RegistrationInput, workspace: Workspace) -> RegisteredVersion:
    """Write the run, upload the model, register a version, set the alias.

    Raises:
        ConnectionError: when the server does not answer.
    """
    check_name(asked.name)
    client = open_client(workspace)
    run = client.create_run(_experiment(client, workspace), run_name=asked.name, tags=_tags(asked))
    run_id, model_id = run.info.run_id, ""
    try:
        _log_facts(client, run_id, asked)
        _log_files(client, run_id, asked)
        logged = client.create_logged_model(
            run.info.experiment_id,
            MODEL_NAME,
            run_id,
            params=_flat(asked.parameters),
            model_type="causal-lm",
            tags=_tags(asked),
        )
        model_id = logged.model_id
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=0)])
        _upload_model(client, run_id, model_id, asked.model)
        client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        version = _create_version(client, run_id, model_id, asked)
        client.set_registered_model_alias(asked.name, ALIAS, version)
    except BaseException:
        if model_id:
            client.finalize_logged_model(model_id, LoggedModelStatus.FAILED)
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    get_run_logger().info("registered %s version %s as %s", asked.name, version, ALIAS)
    return RegisteredVersion(asked.name, version, ALIAS, run_id, model_id)


def _experiment(client: MlflowClient, workspace: Workspace) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return str(found.experiment_id)
    # A server knows where artifacts go; without one MLflow would put them into the current folder.
    local = not workspace.tracking_uri.startswith(("http:", "https:"))
    try:
        return str(client.create_experiment(EXPERIMENT, workspace.mlflow_artifacts.as_uri() if local else None))
    except MlflowException:  # another process was quicker
        return str(client.get_experiment_by_name(EXPERIMENT).experiment_id)


def _tags(asked: RegistrationInput) -> dict[str, str]:
    tags = {
        "ratio": f"{asked.pruning.ratio:.4f}",
        "base_model": asked.pruning.base_model,
        "device": asked.pruning.device,
    }
    for name, value in asked.pruned.metrics.items():
        if name.endswith("/perplexity"):
            tags |= {"perplexity": f"{value:.4f}", "perplexity_data": name.rsplit("/", 1)[0]}
    if asked.bench is not None:
        tags["speedup"] = f"{asked.bench.ratios['output_throughput'].median:.4f}"
    return tags | {f"version.{name}": number for name, number in asked.pruning.versions.items()}


def _log_facts(client: MlflowClient, run_id: str, asked: RegistrationInput) -> None:
    """Parameters, metrics and data sets. Params cannot be changed once written, so they go first and once."""
    now, pruning = int(time.time() * 1000), asked.pruning
    totals = (
        "ratio",
        "model_ratio",
        "parameters_before",
        "parameters_after",
        "bytes_before",
        "bytes_after",
        "seconds",
        "peak_memory_bytes",
    )
    flat = {f"pruning/{name}": float(getattr(pruning, name)) for name in totals}
    flat |= {f"dense/{name}": value for name, value in asked.dense.metrics.items()}
    flat |= {f"pruned/{name}": value for name, value in asked.pruned.metrics.items()}
    if asked.bench is not None:
        flat |= {f"bench/{name}": value for name, value in asked.bench.metrics.items()}
    metrics = [Metric(name, float(value), now, 0) for name, value in flat.items()]
    for layer in pruning.layers:
        metrics += [Metric(f"layer/{name}", float(getattr(layer, name)), now, layer.layer) for name in _LAYER_METRICS]
    params = [Param(name, value) for name, value in _flat(asked.parameters).items()]
    for start in range(0, len(params), 100):  # the most that a request may hold
        client.log_batch(run_id, params=params[start : start + 100])
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
    client.log_inputs(run_id, asked.data)


def _dataset(name: str, sha256: str, origin: str, context: str) -> DatasetInput:
    # MLflow keeps 36 characters of a digest; data from the hub has a revision of its own and none
    source = json.dumps({"origin": origin, "sha256": sha256})
    dataset = Dataset(
        name=name, digest=sha256[:36] or "none", source_type=origin.replace(" ", "_") or "local", source=source
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _flat(parameters: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"prune": {"ratio": 0.25}}`` -> ``{"prune.ratio": "0.25"}``; of an absolute path only the last part."""
    flat: dict[str, str] = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            text = str(list(value) if isinstance(value, tuple) else value)
            flat[f"{prefix}{key}"] = Path(text).name if Path(text).is_absolute() else text[:6000]
    return flat


def _log_files(client: MlflowClient, run_id: str, asked: RegistrationInput) -> None:
    for place, files in asked.files.items():
        for file in files:
            client.log_artifact(run_id, str(file), place or None)


def _upload_model(client: MlflowClient, run_id: str, model_id: str, folder: Path) -> None:
    """A pyfunc model from code; the checkpoint goes up straight from where it lies: no second copy, nothing loaded."""
    from mlflow import pyfunc

    example = {"prompt": "The capital of France is"}
    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema([ParamSpec("max_new_tokens", "integer", 64), ParamSpec("temperature", "double", 0.0)]),
    )
    needs = [
        f"{name}=={installed(name).partition('+')[0]}"
        for name in ("mlflow", "torch", "transformers", "safetensors", "datasets")
    ]
    with tempfile.TemporaryDirectory() as temporary:
        skeleton = Path(temporary) / "skeleton"
        (marker := Path(temporary) / "model").mkdir()
        (marker / "config.json").write_text("{}")
        description = Model(run_id=run_id, model_uuid=model_id, model_id=model_id)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*ype hint.*")  # the signature is given
            pyfunc.save_model(
                path=str(skeleton),
                python_model=str(Path(deploy.__file__).parent / "pyfunc_model.py"),
                code_paths=[str(Path(slimgpt.__file__).parent)],
                artifacts={"model": str(marker)},
                mlflow_model=description,
                signature=signature,
                input_example=[example],
                pip_requirements=needs,
            )
        _forget_places(skeleton, description)
        description.model_size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        description.save(str(skeleton / "MLmodel"))
        client.log_model_artifacts(model_id, str(skeleton))
        client.log_model_artifacts(model_id, str(folder), MODEL_PATH)


def _forget_places(skeleton: Path, description: Model) -> None:
    """Take this machine's folders out of the description, and away the marker that stood for the checkpoint."""
    for config in description.flavors.values():
        for artifact in config.get("artifacts", {}).values():
            artifact["uri"] = artifact["path"]
        config["model_code_path"] = Path(config["model_code_path"]).name  # all that the loader reads of it
    (skeleton / MODEL_PATH / "config.json").unlink()


def _create_version(client: MlflowClient, run_id: str, model_id: str, asked: RegistrationInput) -> str:
    pruning = asked.pruning
    try:
        client.create_registered_model(asked.name, description="Pruned by SlimGPT.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    description = (
        f"{pruning.base_model} without {pruning.ratio:.1%} of its projection parameters "
        f"({pruning.parameters_before / 1e6:.1f} M -> {pruning.parameters_after / 1e6:.1f} M)."
    )
    version = client.create_model_version(
        asked.name,
        f"models:/{model_id}",
        run_id,
        tags=_tags(asked),
        description=description,
        model_id=model_id,
        await_creation_for=120,
    )
    return str(version.version)


def parameters_of(**configs: Any) -> dict[str, Any]:
    """Dataclasses and plain values as one nested dict of parameters."""
    return {
        name: dataclasses.asdict(config)
        if dataclasses.is_dataclass(config) and not isinstance(config, type)
        else config
        for name, config in configs.items()
    }
