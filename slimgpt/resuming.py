"""Whether an interrupted run may go on: what its result depends on, against what this run would give."""

from typing import Any


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two runs differ in, each value before and now."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(
        f"{key.removeprefix('config.')} was {_short(old.get(key))}, now {_short(new.get(key))}" for key in keys[:4]
    )


def remedy(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What makes the new run the old one again, where that is within reach."""
    if "threads" in old and {**old, "threads": 0} == {**new, "threads": 0}:
        return f"set OMP_NUM_THREADS={old['threads']} to resume it, or name another OUT"
    if {**old, "mkl": ""} == {**new, "mkl": ""}:
        return "import slimgpt's engine before torch computes, with the MKL_CBWR it was begun with, or name another OUT"
    for package in ("torch", "transformers"):
        if {**old, package: ""} == {**new, package: ""} and package in old:
            return f"install {package}=={old[package]} to resume it, or name another OUT"
    if {**old, "code": ""} == {**new, "code": ""}:
        return "take the version of slimgpt that began it, or name another OUT"
    return "name another OUT"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "..."
