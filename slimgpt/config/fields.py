"""Fields of config dataclasses: each has a description and limits, checked when the config is made."""

import dataclasses
import math
import numbers
import operator
import os
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

BosPolicy = Literal["auto", "none", "stream", "block"]
BOS_WORDS = (
    "BOS before the text: block (before every block, as one of its tokens), stream (once), none, or auto: block where "
    "the model's tokenizer or family has it, else none."
)

DTYPE_WORDS = (
    "auto: the checkpoint's own on a GPU; on a CPU bfloat16 for 16-bit checkpoints where it has units for that "
    "(AVX512-BF16, AMX), else float32."
)


def option(default: Any, description: str, **limits: Any) -> Any:
    """A config field whose description and limits (ge, gt, le, lt) reach the CLI's help and the UI's form."""
    return field(default=default, metadata={"description": description, **limits})


LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def limits_text(metadata: Mapping[str, Any]) -> str:
    """A field's limits as help, forms and documents show them: "at least 0, at most 0.9"; empty where it has none."""
    return ", ".join(f"{words} {metadata[side]}" for side, words in LIMITS.items() if side in metadata)


def check_limits(config: Any) -> None:
    """Check every field of a config dataclass against its declared type and limits.

    A ``Path`` becomes its text, 8.0 where an integer belongs becomes 8, and a number of numpy's Python's own: what a
    config holds can be written as JSON.

    Raises:
        ValueError: naming the field, its value, the limit and what the field means.
    """
    for item in dataclasses.fields(config):
        value, meta = getattr(config, item.name), item.metadata
        choices = getattr(item.type, "__args__", ()) if getattr(item.type, "__origin__", None) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{item.name} is {value!r}; it must be one of {', '.join(map(str, choices))}")
        if item.type is str and isinstance(value, os.PathLike):
            object.__setattr__(config, item.name, os.fspath(value))
        elif item.type in (str, bool) and not isinstance(value, item.type):
            kind = "a text" if item.type is str else "true or false"
            raise ValueError(f"{item.name} is {value!r}; it must be {kind}: {meta['description']}")
        if item.type in (int, float):
            if isinstance(value, str) and _is_number(value):
                raise ValueError(f"{item.name} is the text {value!r}; write the number {float(value):g}")
            if not _is_real(value) or not math.isfinite(value):
                raise ValueError(f"{item.name} is {value!r}; it must be a finite number: {meta['description']}")
            if item.type is int and value != int(value):
                raise ValueError(f"{item.name} is {value!r}; it must be an integer: {meta['description']}")
            if item.type is int or not isinstance(value, int | float):
                object.__setattr__(config, item.name, item.type(value))  # 8.0 is a number of nothing to be indexed
            for side, words in LIMITS.items():
                if side in meta and not getattr(operator, side)(value, meta[side]):
                    raise ValueError(f"{item.name} is {value}; it must be {words} {meta[side]}: {meta['description']}")


def numbers_of(name: str, value: Any) -> tuple[float, ...]:
    """A list of numbers, as JSON, YAML or numpy bring it, as a tuple of Python's own.

    Raises:
        ValueError: naming the field and its value.
    """
    try:
        given = list(value)
    except TypeError:
        given = [None]
    if isinstance(value, str) or not all(map(_is_real, given)):
        raise ValueError(f"{name} is {value!r}; it must be a list of numbers")
    return tuple(number if isinstance(number, int | float) else float(number) for number in given)


def whole_as_text(config: Any, *names: str) -> None:
    """Make a whole number its text in fields that take ``2M`` as well: YAML reads 131072 as a number."""
    for name in names:
        if type(value := getattr(config, name)) is int:
            object.__setattr__(config, name, str(value))


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_number(text: str) -> bool:
    """Whether YAML's text stands for a number: it takes 1e-2, without a point, for a text."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
