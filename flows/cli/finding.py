"""What several commands need: the folder of a model, the settings of a preset, a flow's parameters."""

import importlib.util
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.cli.flags import config_from, given, read_config_file
from slimgpt.config import PruneConfig, paper_preset


def preset_layers(name: str | None, *layers: dict[str, Any]) -> list[dict[str, Any]]:
    """A preset, which depends on the ratio, and then what the user gave."""
    said = {key for layer in layers for key in layer}
    for target in sorted(said & {"target_size", "target_parameters", "target_speedup"}):
        if name == "paper":
            raise ValueError(f"preset is paper and {target} is given; its settings depend on the ratio: give that")
        if "ratio" in said:  # also where it is the default, which a config cannot tell
            raise ValueError(f"ratio and {target} are given, and each says how much is removed; leave one out")
    ratio = next((layer["ratio"] for layer in reversed(layers) if "ratio" in layer), PruneConfig().ratio)
    return [paper_preset(ratio), *layers] if name == "paper" else list(layers)


def flow_parameters(
    file: str, sections: dict[str, Any], flags: dict[str, Any], plain: dict[str, Any], preset: str | None = None
) -> dict[str, Any]:
    """A flow's parameters: flags win over the config file, that over a preset, and that over the defaults.

    Args:
        file: a YAML file, or "".
        sections: parameter -> its default config.
        flags: parameter -> the flags that were given for it.
        plain: the other parameters; None where not given. A key that the file leaves empty is not given either.
        preset: of the section ``prune``.

    Raises:
        FileNotFoundError, ValueError: as ``read_config_file`` and the configs raise.
    """
    from_file = read_config_file(file, sections, tuple(plain)) if file else {}
    parameters = {key: value for key, value in from_file.items() if key in plain and value is not None}
    parameters |= {key: value for key, value in plain.items() if value is not None}
    layers = {key: [from_file.get(key, {}), given(flags[key])] for key in sections}
    layers["prune"] = preset_layers(preset, *layers["prune"])
    return parameters | {key: config_from(sections[key], *layers[key]) for key in sections}


def check_types(flow: Callable[..., Any], parameters: dict[str, Any]) -> None:
    """Check the values for a flow before a server starts for it: Prefect's own check ends in a traceback.

    Raises:
        ValueError: naming the parameter, the value and what it can be.
    """
    for name, hint in typing.get_type_hints(flow, include_extras=True).items():
        if name in parameters:
            check_type(name, parameters[name], hint)


def check_type(name: str, value: Any, hint: Any) -> None:
    """Check one value for a flow.

    Raises:
        ValueError: naming the parameter, the value and what it can be.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        # YAML reads a commit of digits, or a name such as "on", as something else than text
        quoted = first["type"] == "string_type" and not isinstance(first["input"], list | dict)
        remedy = "; put it in quotes" if quoted else ""
        raise ValueError(f"{name} is {first['input']!r}; {first['msg'].lower()}{remedy}") from None


def check_new_file(out: Path | None) -> None:
    """Refuse, before long work, a name that cannot be a file's; None where none is written.

    Raises:
        FileNotFoundError: its folder does not exist.
        PermissionError: this user cannot write to it.
        ValueError: it is a folder.
    """
    if out is None:
        return
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {out} does not exist; make it first")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the name of a file in it")
    from slimgpt.files import check_writable

    check_writable(out.absolute().parent)


def check_new_folder(out: Path | None) -> None:
    """Refuse, before long work, a name that cannot be a folder's; None where nothing is written.

    Raises:
        PermissionError: this user cannot write to it.
        ValueError: a file stands in its way.
    """
    for place in (out, *out.absolute().parents) if out else ():
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file; give the name of a folder")
    if out:
        from slimgpt.files import check_writable

        check_writable(out)


def find(model: str, revision: str, runs: str = "") -> Path:
    """The local folder of a model; MLflow is imported only where a URI asks for it."""
    from tasks.environment import prepare

    workspace = prepare(runs)
    if model.startswith(("models:", "runs:")):
        if importlib.util.find_spec("mlflow") is None:
            raise ValueError(f"{model} is in a registry, and mlflow is not installed; pip install 'slimgpt[flows]'")
        from slimgpt.checkpoints.source import refuse_revision
        from tasks.registry.fetching import fetch_model

        refuse_revision(model, revision)
        return fetch_model(model, workspace)
    from slimgpt.checkpoints.source import resolve_model

    return resolve_model(model, revision=revision)
