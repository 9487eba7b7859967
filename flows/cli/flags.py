"""Command-line flags out of config dataclasses: names, help, limits and defaults are written once, in the config.

A flag that is not given is None, so that what was given is known: flags win over a file, and a file over defaults.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from cyclopts import Parameter, Token

from slimgpt.config import limits_text


def whole_number(_: Any, tokens: Sequence[Token]) -> int:
    """An int from the command line. cyclopts itself rounds: 8.9 would be 9, and --version 3.9 another version.

    Raises:
        ValueError: when it is not a whole number.
    """
    text = tokens[0].value
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


WholeNumber = Annotated[int, Parameter(converter=whole_number)]


def flags(name: str, defaults: Any, *, group: str, prefix: str = "", leave_out: tuple[str, ...] = ()) -> Any:
    """A dataclass of optional flags for the config ``defaults``; use it as ``Annotated[..., Parameter(name="*")]``."""
    hints = typing.get_type_hints(type(defaults))
    fields = []
    for item in dataclasses.fields(defaults):
        if item.name in leave_out:
            continue
        default = getattr(defaults, item.name)
        hint = hints[item.name]
        numbers = hint == tuple[float, ...]
        many = hint in (tuple[str, ...], tuple[float, ...])
        if many:
            hint = str  # one value, "a,b,c"
        exact: dict[str, Any] = {"converter": whole_number} if hint is int else {}
        shown = ",".join(map(str, default)) if many else default
        parameter = Parameter(
            name=f"--{prefix}{item.name.replace('_', '-')}",
            help=item.metadata.get("description", "")
            + (f" [{limits}]" if (limits := limits_text(item.metadata)) else "")
            + (" Separate several by commas." if numbers else ""),
            show_default=_always(str(shown)) if str(shown) else False,
            negative="--no-" + prefix + item.name.replace("_", "-") if hint is bool else (),
            group=group,
            **exact,
        )
        fields.append((item.name, Annotated[hint | None, parameter], dataclasses.field(default=None)))
    made = dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
    made.__module__ = __name__  # cyclopts takes a class of the module "types" for a plain value
    return made


def _always(text: str) -> Callable[[Any], str]:
    return lambda _: text


def given(chosen: Any) -> dict[str, Any]:
    """The flags that the user gave."""
    return {
        item.name: value for item in dataclasses.fields(chosen) if (value := getattr(chosen, item.name)) is not None
    }


def config_from(defaults: Any, *layers: dict[str, Any], where: str = "") -> Any:
    """``defaults`` with the values of each layer, later ones winning.

    Raises:
        ValueError: for a key that is not a field, naming those that are; or from the config's own checks.
    """
    known = [item.name for item in dataclasses.fields(defaults)]
    hints = typing.get_type_hints(type(defaults))
    values: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if key not in known:
                raise ValueError(f"{where}{key} is not known; known are {', '.join(known)}")
            if hints[key] in (tuple[str, ...], tuple[float, ...]):
                value = several(key, value, float if hints[key] == tuple[float, ...] else str)
            values[key] = value
    return dataclasses.replace(defaults, **values)


def several(key: str, value: Any, kind: type) -> tuple[Any, ...]:
    """A list of names or numbers, given as one text "a,b,c", as one number or as a list. Empty parts are left out.

    Raises:
        ValueError: naming the key and the value.
    """
    parts = [part.strip() for part in str(value).split(",")] if isinstance(value, str | int | float) else value
    try:
        return tuple(kind(part) for part in parts if part not in ("", None))  # YAML's empty item is None
    except (TypeError, ValueError):
        raise ValueError(
            f"{key} is {value!r}; it must be a list of {'numbers' if kind is float else 'names'}"
        ) from None


def read_config_file(path: str, sections: dict[str, Any], plain: tuple[str, ...]) -> dict[str, Any]:
    """A YAML file of flow parameters: ``sections`` hold a mapping each, ``plain`` keys a value.

    Raises:
        FileNotFoundError, ValueError: when it is missing, not YAML, or holds a key that the flow does not know.
    """
    from pathlib import Path

    import yaml

    from slimgpt.files import exists

    file = Path(path)
    if not exists(file) or not file.is_file():
        raise FileNotFoundError(f"config file {path!r} does not exist")
    try:
        data = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds {type(data).__name__}; it must hold the flow's parameters by name")
    for key, value in data.items():
        if key not in sections and key not in plain:
            raise ValueError(f"{path}: {key} is not known; known are {', '.join((*plain, *sections))}")
        if key in sections and not isinstance(value, dict):
            raise ValueError(
                f"{path}: {key} is {value!r}; it must hold settings by name, such as {key}: {{ratio: 0.25}}"
            )
        if key in sections:
            config_from(sections[key], value, where=f"{path}: {key}.")
    return data
