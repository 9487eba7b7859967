"""Move an alias of a registered model, by gates, and back. Every move and every refusal is written into version tags.

MLflow moves an alias in one call, but has no compare-and-set: the present holder is read again right before the move,
and the alias right after it. One writer at a time is the deployment's business (docs/registry.md).
"""

import getpass
import json
import logging
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tasks.environment import Workspace
from tasks.registry.client import explained, open_client
from tasks.registry.gates import Figures, Gate, GateConfig, judge, refusals, to_dict
from tasks.registry.names import check_name
from tasks.registry.run_content import SETTING

CHAMPION = "champion"
_NO_VERSION = 2**31 - 1  # databases keep no larger number, and MLflow counts from 1
AUDIT = "audit."  # of the tags: audit.2026-01-31T12:00:00.000000Z


class PromotionRefusedError(ValueError):
    """A version did not pass; the message says which gates, and by how much."""


@dataclass(frozen=True)
class Moved:
    """Where an alias points now.

    Args:
        previous: the version that had it before; the same one where it had it already, empty where none had it.
        gates: as they were judged; empty for a rollback.
    """

    name: str
    alias: str
    version: str
    previous: str
    gates: list[Gate] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The result in one line."""
        if self.previous == self.version:
            return f"{self.alias} of {self.name} is version {self.version} already"
        was = f", was version {self.previous}" if self.previous else ""
        return f"{self.alias} of {self.name} is version {self.version}{was}"


def promote(name: str, version: int, alias: str, config: GateConfig, workspace: Workspace, *, by: str = "") -> Moved:
    """Let ``alias`` point to ``version`` where it passes the gates; what had it before gets the alias ``previous``.

    Args:
        name: of the registered model.
        version: the candidate.
        alias: ``champion``, or another one.
        config: the gates.
        workspace: whose registry it is, where no server is named.
        by: who promotes, for the trail; the user's name where empty.

    Raises:
        PromotionRefusedError: when a gate is not passed. The alias stays.
        FileNotFoundError: when there is no such version, or it is incomplete.
        ValueError: for an alias that cannot be moved.
        ConnectionError: when the server does not answer.
        PermissionError: when it does not let this user do that.
    """
    check_name(name)
    check_alias(alias)
    client = open_client(workspace)
    with explained(f"{name} version {version} was promoted", _stays(alias), workspace):
        return _promote(client, name, version, alias, config, by)


def _promote(client: MlflowClient, name: str, version: int, alias: str, config: GateConfig, by: str) -> Moved:
    candidate, present = _version(client, name, version), _holder(client, name, alias)
    if present is not None and present.version == candidate.version:
        return Moved(name, alias, str(version), str(version))
    gates = judge(_figures(client, candidate), _figures(client, present) if present else None, config)
    record: dict[str, Any] = {"alias": alias, "who": by or _user(), "gates": to_dict(gates)}
    record |= {"from": _number(present), "to": _number(candidate)}
    if problems := refusals(gates):
        _write(client, name, [candidate], {**record, "action": "promote", "outcome": "refused", "why": problems})
        raise PromotionRefusedError(f"{name} version {version} does not become {alias}: {problems}")
    _move(client, name, alias, candidate, present, {**record, "action": "promote"})
    return Moved(name, alias, str(version), _number(present), gates)


def rollback(name: str, workspace: Workspace, *, alias: str = CHAMPION, by: str = "") -> Moved:
    """Give ``alias`` back to the version that had it before. Once: the alias ``previous`` then goes.

    Raises:
        FileNotFoundError: when there is no version to go back to.
        ValueError: for an alias that cannot be moved.
        ConnectionError: when the server does not answer.
        PermissionError: when it does not let this user do that.
    """
    check_name(name)
    check_alias(alias)
    client = open_client(workspace)
    with explained(f"{name} was rolled back", _stays(alias), workspace):
        return _rollback(client, name, alias, by)


def _stays(alias: str) -> str:
    """What holds wherever a move is cut short: an alias moves in one call."""
    return f"{alias} is where it was, or where it should be"


def _rollback(client: MlflowClient, name: str, alias: str, by: str) -> Moved:
    before, present = _holder(client, name, previous(alias)), _holder(client, name, alias)
    if before is None or (present is not None and before.version == present.version):
        raise FileNotFoundError(
            f"{name} has no version to go back to: nothing has the alias {previous(alias)}; "
            f"use slimgpt promote {name} --version N --to {alias}"
        )
    record = {"alias": alias, "who": by or _user(), "from": _number(present), "to": _number(before)}
    _move(client, name, alias, before, present, {**record, "action": "rollback"})
    return Moved(name, alias, _number(before), _number(present))


def trail(client: MlflowClient, name: str, version: str) -> list[dict[str, Any]]:
    """What happened to a version, oldest first: action, outcome, alias, who, from, to, gates and when."""
    tags = client.get_model_version(name, version).tags
    return [{"when": key.removeprefix(AUDIT), **json.loads(tags[key])} for key in sorted(tags) if key.startswith(AUDIT)]


def previous(alias: str) -> str:
    """The alias of the version that had ``alias`` before."""
    return "previous" if alias == CHAMPION else f"previous-{alias}"


def check_alias(alias: str) -> str:
    """Return ``alias`` where it can be moved.

    Raises:
        ValueError: when MLflow refuses or reserves it, or this module keeps it itself.
    """
    reserved = alias == "latest" or re.fullmatch(r"[vV]\d+", alias) or alias.startswith("previous")
    if reserved or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", alias):
        raise ValueError(
            f"alias is {alias!r}; it must be letters, digits, _ and -, and not latest, v1 (MLflow's own) or previous"
        )
    return alias


def _move(
    client: MlflowClient,
    name: str,
    alias: str,
    target: ModelVersion,
    present: ModelVersion | None,
    record: dict[str, Any],
) -> None:
    """Record the intention, keep the way back, move, record that it is done. The alias itself moves in one call.

    What dies on the way leaves a trail that says "started" and an alias that is where it was or where it should be.
    """
    concerned = [target, *([present] if present else [])]
    key = _write(client, name, concerned, {**record, "outcome": "started"})
    if _number(_holder(client, name, alias)) != _number(present):
        raise ConnectionError(f"{alias} of {name} was moved by someone else just now; look, and run this again")
    if record["action"] == "promote" and present is not None:
        client.set_registered_model_alias(name, previous(alias), present.version)
    client.set_registered_model_alias(name, alias, target.version)
    if record["action"] == "rollback":
        client.delete_registered_model_alias(name, previous(alias))
    if (now := _number(_holder(client, name, alias))) != _number(target):
        raise ConnectionError(f"{alias} of {name} was moved to version {now} by someone else just now")
    _write(client, name, concerned, {**record, "outcome": "moved"}, key)


def _write(client: MlflowClient, name: str, versions: list[ModelVersion], record: dict[str, Any], key: str = "") -> str:
    key = key or AUDIT + datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    for version in versions:
        client.set_model_version_tag(name, version.version, key, json.dumps(record))
    return key


def _version(client: MlflowClient, name: str, number: int) -> ModelVersion:
    try:
        version = client.get_model_version(name, str(min(number, _NO_VERSION)))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = ", ".join(sorted((str(v.version) for v in client.search_model_versions(f"name='{name}'")), key=int))
        has = f"{name} has {known}" if known else f"there is no model {name}"
        raise FileNotFoundError(f"{name} version {number} does not exist; {has}") from None
    if version.status != "READY":
        raise FileNotFoundError(f"{name} version {number} is incomplete (its status is {version.status})")
    return version


def _holder(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _number(version: ModelVersion | None) -> str:
    return "" if version is None else str(version.version)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def _older_dtype(version: ModelVersion, settings: dict[str, str]) -> str:
    """What a version that does not say was evaluated in: auto was float32 on a CPU."""
    given = settings.get("evaluation.dtype", "auto")
    return "float32" if given == "auto" and version.tags.get("device", "").startswith("cpu") else given


def _figures(client: MlflowClient, version: ModelVersion) -> Figures:
    """What the run of a version measured. A version that no run stands behind, or no longer, has measured nothing."""
    base = version.tags.get("dense_model") or version.tags.get("base_model", "")  # older versions have the second alone
    if not version.run_id:
        return Figures(base)
    try:
        run: Run = client.get_run(version.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        logging.getLogger(__name__).warning(
            "the run behind %s version %s was removed, and its figures with it", version.name, version.version
        )
        return Figures(base)
    sides: dict[str, dict[str, float]] = {"dense": {}, "pruned": {}}
    for name, value in run.data.metrics.items():
        side, _, rest = name.partition("/")
        if side in sides:
            sides[side][rest] = value
    settings = {name: value for name, value in run.data.params.items() if name.startswith(("evaluation.", "bench."))}
    for item in run.inputs.dataset_inputs if run.inputs else []:
        if any(tag.value == "evaluation" for tag in item.tags):
            settings[f"data.{item.dataset.name}"] = item.dataset.digest
    settings |= {name: value for name, value in version.tags.items() if name.startswith(SETTING)}  # measured later
    # What auto became; older versions were measured without BOS.
    settings["evaluation.bos"] = version.tags.get("bos", "none")
    settings["evaluation.dtype"] = version.tags.get("dtype") or _older_dtype(version, settings)
    # Older versions have the pruning's device alone: it never equals a machine, so their speeds are not compared.
    settings["bench_machine"] = version.tags.get("bench_machine") or version.tags.get("device", "")
    return Figures(base, **sides, speedup=run.data.metrics.get("bench/ratio/output_throughput"), settings=settings)
