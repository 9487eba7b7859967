"""The prune step alone, in a small flow: found again by content, and only where it is still whole."""

import os
from pathlib import Path

import pytest
from prefect import flow

from slimgpt.config import PruneConfig
from tasks.digests import folder_digest
from tasks.environment import Workspace
from tasks.preflight.models import ResolvedModel, resolve
from tasks.preflight.planning import plan_pruning
from tasks.steps.pruning import PruneRequest, prune_model
from tests.tiny_models import write_dense

CONFIG = PruneConfig(num_samples=4, seq_len=64, calibration="python", ffn_multiple=4)


@flow(persist_result=False)
def once(model: str, root: str, config: PruneConfig) -> tuple[Path, int]:
    workspace = Workspace(Path(root))
    dense: ResolvedModel = resolve(model, "", workspace)
    wanted = PruneRequest(dense, config, plan_pruning(dense.folder, config))
    folder = prune_model(wanted, workspace.run("tiny-slim", wanted.facts)).folder
    return folder, (folder / "pruning.json").stat().st_mtime_ns  # when it was made


@pytest.fixture
def dense(tmp_path):
    return write_dense(tmp_path / "tiny", num_hidden_layers=2)


def test_the_same_request_is_made_once_and_what_is_damaged_again(prefect_server, dense, tmp_path):
    folder, made = once(str(dense), str(tmp_path / "runs"), CONFIG)
    digest = folder_digest(folder)
    assert once(str(dense), str(tmp_path / "runs"), CONFIG) == (folder, made)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    again, made_again = once(str(dense), str(tmp_path / "runs"), CONFIG)
    assert again == folder
    assert made_again > made
    assert folder_digest(folder) == digest
    # what was made again is found again
    assert once(str(dense), str(tmp_path / "runs"), CONFIG) == (folder, made_again)


def test_another_model_config_or_text_is_another_folder(prefect_server, dense, tmp_path):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text, word in zip(texts, ("one two three ", "four five six "), strict=True):
        text.write_text(word * 2000)
    where = tmp_path / "text.txt"
    os.link(texts[0], where)
    config = PruneConfig(num_samples=4, seq_len=64, calibration=str(where), ffn_multiple=4)
    runs, folders = str(tmp_path / "runs"), set()
    folders.add(once(str(dense), runs, config)[0])
    where.unlink()
    os.link(texts[1], where)  # the same name, another text
    folders.add(once(str(dense), runs, config)[0])
    folders.add(once(str(dense), runs, PruneConfig(**{**config.to_dict(), "ratio": 0.3}))[0])
    write_dense(dense, num_hidden_layers=2, seed=1)  # the same name, other weights
    folders.add(once(str(dense), runs, config)[0])
    assert len(folders) == 4
