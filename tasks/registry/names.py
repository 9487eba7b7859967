"""Names in the registry: of models, versions and aliases, and of what is stored where. Needs no MLflow."""

import re
from dataclasses import dataclass

from slimgpt.checkpoints.source import model_name
from slimgpt.files import exists, expanded

ALIAS = "challenger"
MODEL_PATH = "artifacts/model"  # of the Hugging Face folder inside a logged model
LONGEST_NAME = 200  # folders are named after it, and what lies beside them while it is written
CHECKSUM = "sha256"  # tag: over the names and contents of that folder's files
LOCATION = "location"  # tag: where the folder is, when it was registered by reference
MODEL_URI = re.compile(r"(?P<scheme>models|runs):/+(?P<rest>.+)")


@dataclass(frozen=True)
class RegisteredVersion:
    """A version in the registry."""

    name: str
    version: str
    alias: str
    run_id: str
    model_id: str

    @property
    def uri(self) -> str:
        """What other tools take: it follows the alias."""
        return f"models:/{self.name}@{self.alias}"


def is_model_uri(model: str) -> bool:
    """Whether ``model`` names a logged or registered model rather than a folder or a hub id."""
    return bool(MODEL_URI.fullmatch(model))


def check_name(name: str) -> str:
    """Return ``name`` where it can name a registered model.

    Raises:
        ValueError: when MLflow, a server's URLs or a folder of runs could not carry it.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"name is {name!r}; a registered model's name has letters, digits and . _ - only")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"name has {len(name)} letters; a registered model's name has at most {LONGEST_NAME}")
    return name


def label_of(model: str) -> str:
    """A short name for tables and for folders of results: the last part; a path of this machine says nothing to others.

    Of a registered model ``NAME@alias`` or ``NAME@3``, whose last part alone would be ``3``.
    """
    if (uri := MODEL_URI.fullmatch(model)) and uri["scheme"] == "models":
        return uri["rest"].strip("/").replace("/", "@")
    if not uri and exists(expanded(model)) and expanded(model).is_dir():
        # A hub snapshot's folder is named after the commit, "." after nothing.
        model = model_name(expanded(model))
    return model.rstrip("/").rsplit("/", 1)[-1] or "model"


def default_name(model: str) -> str:
    """The registered name of what becomes of ``model``: its label, without what MLflow refuses, and ``-slim``.

    A GGUF file's ending is no part of it: what is registered is no such file.
    """
    last = label_of(model).partition("@")[0]
    last = re.sub(r"\.gguf$", "", last, flags=re.IGNORECASE)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._").removesuffix("-slim")
    return f"{name[: LONGEST_NAME - len('-slim')] or 'model'}-slim"
