"""The pruned checkpoint as an MLflow model: pyfunc from code, with a signature, an input example and a checksum."""

import tempfile
import warnings
from importlib.metadata import version as installed
from pathlib import Path

from mlflow import MlflowClient
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

import slimgpt
from slimgpt.checkpoints.headers import raw_config
from tasks.registry.names import MODEL_PATH

EXAMPLE = {"prompt": "The capital of France is"}


def upload_model(client: MlflowClient, run_id: str, model_id: str, folder: Path, *, copy: bool = True) -> None:
    """Upload what MLflow needs to load ``folder``, and, with ``copy``, its files straight from where they lie.

    Nothing is loaded into memory, and no second copy is made on the way.
    """
    from mlflow import pyfunc

    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema([ParamSpec("max_new_tokens", "integer", 64), ParamSpec("temperature", "double", 0.0)]),
    )
    quantized = ["compressed-tensors"] if "quantization_config" in raw_config(folder) else []
    needs = [
        f"{name}=={installed(name).partition('+')[0]}"
        for name in ("mlflow", "torch", "transformers", "safetensors", "datasets", *quantized)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        skeleton = Path(temporary) / "skeleton"
        (marker := Path(temporary) / "model").mkdir()
        (marker / "config.json").write_text("{}")
        description = Model(run_id=run_id, model_uuid=model_id, model_id=model_id)
        # Recorded, since MLflow puts a filter of its own before any that is set here.
        with warnings.catch_warnings(record=True) as recorded:
            pyfunc.save_model(
                path=str(skeleton),
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                code_paths=[str(Path(slimgpt.__file__).parent)],
                artifacts={"model": str(marker)},
                mlflow_model=description,
                signature=signature,
                input_example=[EXAMPLE],
                pip_requirements=needs,
            )
        for one in recorded:
            if "ype hint" not in str(one.message):  # the signature is given
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        _forget_places(skeleton, description, "" if copy else str(folder.absolute()))
        description.model_size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        description.save(str(skeleton / "MLmodel"))
        client.log_model_artifacts(model_id, str(skeleton))
        if copy:
            client.log_model_artifacts(model_id, str(folder), MODEL_PATH)


def _forget_places(skeleton: Path, description: Model, reference: str) -> None:
    """Take this machine's folders out of the description, and away the marker that stood for the checkpoint.

    Args:
        skeleton: MLflow's folder of the model.
        description: its MLmodel.
        reference: the checkpoint's own folder, where the model is registered by reference; MLflow joins it to its own
            folder, which an absolute path replaces.
    """
    for config in description.flavors.values():
        for artifact in config.get("artifacts", {}).values():
            artifact["path"] = reference or artifact["path"]
            artifact["uri"] = artifact["path"]
        config["model_code_path"] = Path(config["model_code_path"]).name  # all that the loader reads of it
    (skeleton / MODEL_PATH / "config.json").unlink()
