"""One tiny dense model per geometry, written once per session, and a config that prunes it in a second."""

import pydoc_data.topics
import shutil
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from slimgpt.checkpoints.hub import hub_obstacle
from slimgpt.config import PruneConfig
from slimgpt.engine.pruner import prune
from tests.hub_server import Hub
from tests.slimgpt.checkpoints.found_checkpoints import SMALL, logits
from tests.tiny_models import write_dense


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Grouped-query: 8 heads on 4 kv heads, head_dim 16 on a hidden size of 64 (so head_dim is not hidden / heads)."""
    return write_dense(tmp_path_factory.mktemp("dense"), num_hidden_layers=4)


@pytest.fixture(scope="session")
def dense_mha(tmp_path_factory):
    """Multi-head, output head not tied, two shards."""
    folder = tmp_path_factory.mktemp("dense_mha")
    return write_dense(
        folder, num_key_value_heads=8, head_dim=8, tie_word_embeddings=False, max_shard_size="200KB", seed=1
    )


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Some 100 kB of English, from Python's own documentation."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:20]))
    return path


@pytest.fixture(scope="session")
def tiny_config(text_file):
    """PruneConfig for a tiny model; keyword arguments override."""

    def make(**fields):
        small = {
            "ratio": 0.3,
            "schedule": "log",
            "ffn_multiple": 4,
            "num_samples": 8,
            "seq_len": 64,
            "block_tokens": 128,
        }
        return PruneConfig(**{**small, "calibration": str(text_file), **fields})

    return make


@pytest.fixture
def copy(dense, tmp_path):
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(dense, tmp_path / "copy"))


@pytest.fixture(scope="session")
def twin(tmp_path_factory, tiny_config):
    """The plain checkpoint of this dtype and tie, and its logits, and those of the pruned model."""
    models = {}

    def make(dtype, tied):
        if (dtype, tied) not in models:
            folder = write_dense(tmp_path_factory.mktemp("twin") / "m", dtype=dtype, tie_word_embeddings=tied, **SMALL)
            prune(folder, folder.parent / "out", tiny_config())
            models[dtype, tied] = folder, logits(folder), logits(folder.parent / "out")
        return models[dtype, tied]

    return make


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The server, with this process's hub client configured as HF_ENDPOINT and HF_HUB_CACHE configure a new process."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SLIMGPT_DATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with Hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        close_session()
        hub_obstacle.cache_clear()
        yield server
    hub_obstacle.cache_clear()
    close_session()


@pytest.fixture
def offline(hub, monkeypatch):
    """A function that sets HF_HUB_OFFLINE; after it no request may be made."""

    def switch():
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub_obstacle.cache_clear()
        hub.requests.clear()

    return switch
