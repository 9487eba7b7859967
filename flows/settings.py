"""docs/settings.md, made from the config dataclasses: python -m flows.settings > docs/settings.md."""

import dataclasses
from typing import Any

from flows.defaults import BENCH, EVALUATION, PRUNE, REGISTRY, SWEEP
from slimgpt.config import limits_text
from tasks.registry.gates import GateConfig

HEAD = """# Settings

Every field of the config classes, made from them by `python -m flows.settings`. On the command line a field is a
flag (`--num-samples 32`), in a config file an entry of its section, in Prefect's form a field of it. `slimgpt compress`
puts `--evaluation.`, `--bench.` and `--registry.` before those of the second, third and fourth; where its default
differs from that of the single command it stands in brackets. The grid is
that of `slimgpt sweep`, the gates those of `slimgpt promote`.
"""


def _type(item: Any) -> str:
    choices = getattr(item.type, "__args__", ())
    if choices and getattr(item.type, "__origin__", None) is not tuple:
        return ", ".join(map(str, choices))
    return "list" if choices else str(getattr(item.type, "__name__", item.type))


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value) or "empty"


def table(flow_default: Any) -> str:
    """A Markdown table of one config class, given what ``compress`` uses for it."""
    single = type(flow_default)()
    lines = ["| field | type or choices | default | limits | |", "|---|---|---|---|---|"]
    for item in dataclasses.fields(single):
        limits = limits_text(item.metadata)
        default, in_flow = _value(getattr(single, item.name)), _value(getattr(flow_default, item.name))
        shown = default if default == in_flow else f"{default} [{in_flow}]"
        cells = (f"`{item.name}`", _type(item), shown, limits, item.metadata["description"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def document() -> str:
    """The entire file."""
    sections = (
        ("prune", PRUNE),
        ("evaluation", EVALUATION),
        ("bench", BENCH),
        ("registry", REGISTRY),
        ("grid", SWEEP),
        ("gates", GateConfig()),
    )
    return HEAD + "".join(f"\n## {name}: {type(config).__name__}\n\n{table(config)}\n" for name, config in sections)


if __name__ == "__main__":
    print(document(), end="")
