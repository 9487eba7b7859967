"""``slimgpt package`` and what a killed ``slimgpt serve`` leaves, where the model is not a folder of this machine."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from deploy.bundle.folder import verify_bundle
from deploy.engines.availability import vllm_obstacle
from tests.deploy.slim_checkpoint import write_slim
from tests.flows.cli.test_serve import ROOT, alive, register, start, wait_for
from tests.hub_server import Hub

pytestmark = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")


def package(*words: object, cwd: Path, **variables: str) -> None:
    """``slimgpt package`` in a process of its own, whose hub is what ``variables`` say."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "slimgpt", "package", *map(str, words)],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "HOME": str(cwd), "NO_PROXY": "127.0.0.1,localhost"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def check(bundle: Path, checkpoint: Path, name: str) -> None:
    assert verify_bundle(bundle) == []
    assert yaml.safe_load((bundle / "serve.yaml").read_text())["served-model-name"] == name
    for file in checkpoint.iterdir():
        assert (bundle / "model" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_model_of_the_registry_is_packaged_under_its_name(tmp_path):
    checkpoint = write_slim(tmp_path / "checkpoint")
    register(checkpoint, tmp_path / "runs")
    package("models:/tiny@champion", "bundle", "--runs", "runs", cwd=tmp_path)
    check(tmp_path / "bundle", checkpoint, "tiny")


def test_a_commit_of_the_hub_is_packaged_under_the_id_and_fetched_once(tmp_path):
    checkpoint = write_slim(tmp_path / "checkpoint")
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with Hub() as hub:
        commit = hub.push("org/Tiny-1.0", files)
        hub.push("org/Tiny-1.0", {**files, "model.safetensors": b"another one"})
        words = ("org/Tiny-1.0", "--revision", commit)
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        package(*words, "bundle", cwd=tmp_path, **settings)
        blobs = [path for path in hub.paths("") if "/blobs/" in path]
        package(*words, "again", cwd=tmp_path, **settings)
        assert len(blobs) == 1
        assert [path for path in hub.paths("") if "/blobs/" in path] == blobs
    for bundle in ("bundle", "again"):
        check(tmp_path / bundle, checkpoint, "org/Tiny-1.0")


@needs_vllm
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_serve_that_is_killed_while_it_fetches_leaves_no_process(tmp_path, number):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a registry that takes the call and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        fetching: list[int] = []
        process = start("models:/a@b", "--port", 0, cwd=tmp_path, log=tmp_path / "log", MLFLOW_TRACKING_URI=url)
        try:
            silent.settimeout(60)
            connection, _ = silent.accept()
            fetching = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
            assert fetching
            process.send_signal(number)
            assert process.wait(10) == -number
            wait_for(lambda: not any(map(alive, fetching)), "the end of what fetched", 30)
            connection.close()
        finally:
            for pid in filter(alive, [process.pid, *fetching]):
                os.kill(pid, signal.SIGKILL)
