"""Find the model: a folder, a hub id, the built-in one, or a version in the registry."""

from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.checkpoints.source import resolve_model
from tasks.environment import Workspace
from tasks.registry.fetching import fetch_model
from tasks.registry.names import is_model_uri
from tasks.retrying import ON_NETWORK_FAULTS


@dataclass(frozen=True)
class ResolvedModel:
    """A model as the user named it, and the checkpoint behind the name."""

    name: str
    checkpoint: Checkpoint

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.checkpoint.folder


def find_model(model: str, workspace: Workspace, *, revision: str = "") -> Path:
    """The local folder of any model a user can name.

    Raises:
        FileNotFoundError, ValueError: when there is none; the message says what can be named.
    """
    return fetch_model(model, workspace) if is_model_uri(model) else resolve_model(model, revision=revision)


@task(name="find the model", cache_policy=NO_CACHE, persist_result=False, **ON_NETWORK_FAULTS)
def resolve(model: str, revision: str, workspace: Workspace) -> ResolvedModel:
    """The checkpoint of ``model``; fetched or converted on the first use."""
    return ResolvedModel(model, Checkpoint.open(find_model(model, workspace, revision=revision)))
