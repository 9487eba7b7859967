"""A pruned model and its bundle."""

import shutil
from pathlib import Path

import pytest

from deploy.bundle.folder import write_bundle
from tests.deploy.slim_checkpoint import write_slim


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_slim(tmp_path_factory.mktemp("models") / "slim")


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "slim")


@pytest.fixture
def bundle(model: Path, tmp_path: Path) -> Path:
    return write_bundle(model, tmp_path / "bundle", name="tiny")
