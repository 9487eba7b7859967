"""Find the model: a folder, a hub id, the built-in one, or a version in the registry."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.checkpoints.origins import read_config
from slimgpt.checkpoints.source import refuse_revision, resolve_model
from slimgpt.config import EvalConfig, PruneConfig
from slimgpt.device import compute_dtype, dtype_name, resolve_device
from tasks.environment import Workspace
from tasks.registry.fetching import fetch_model, registered_label
from tasks.registry.names import is_model_uri, label_of
from tasks.retrying import ON_NETWORK_FAULTS

Config = TypeVar("Config", PruneConfig, EvalConfig)


@dataclass(frozen=True)
class ResolvedModel:
    """A model as the user named it, the checkpoint behind the name, and a short name for tables and folders.

    The short name is made here: on another machine, such as Dask's, the same path may be no folder.
    """

    name: str
    checkpoint: Checkpoint
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or label_of(self.name))

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.checkpoint.folder


def find_model(model: str, workspace: Workspace, *, revision: str = "") -> Path:
    """The local folder of any model a user can name.

    Raises:
        FileNotFoundError, ValueError: when there is none; the message says what can be named.
    """
    if is_model_uri(model):
        refuse_revision(model, revision)
        return fetch_model(model, workspace)
    return resolve_model(model, revision=revision)


def settled(config: Config, model: Path) -> Config:
    """The config with the dtype that its ``auto`` means for the model in this folder, on this machine.

    As it is for a model whose config names no dtype.
    """
    if (stored := read_config(model).dtype) is None:
        return config
    return replace(config, dtype=dtype_name(compute_dtype(config.dtype, resolve_device(config.device), stored)))


@task(name="find the model", cache_policy=NO_CACHE, persist_result=False, **ON_NETWORK_FAULTS)
def resolve(model: str, revision: str, workspace: Workspace) -> ResolvedModel:
    """The checkpoint of ``model``; fetched or converted on the first use."""
    checkpoint = Checkpoint.open(find_model(model, workspace, revision=revision))
    label = label_of(model)
    if is_model_uri(model) and "@" not in label:  # an id, of a run or of a model, says nothing to people
        label = registered_label(model, workspace)
    return ResolvedModel(model, checkpoint, label)
