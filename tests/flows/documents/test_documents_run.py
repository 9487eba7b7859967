"""The commands of README and docs, run in their order on a tiny model and with less of everything.

Those that serve are in test_documents_serve.py, `prefect` and `make up` in test_local.py and test_team_servers.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow import MlflowClient

from deploy.bundle.folder import verify_bundle
from deploy.serving.server import check_port
from flows.cli.app import app
from slimgpt.report import load_report
from tests.flows.documents.test_readme import README, ROOT, blocks, commands
from tests.tiny_models import write_dense

SMALLER = "--calibration python --num-samples 4 --seq-len 64 --ffn-multiple 4"
EVALUATION = "--evaluation.tasks none --evaluation.perplexity python --evaluation.seq-len 64 --evaluation.max-blocks 2"
FLAGS = {
    "prune": SMALLER,
    "quantize": "--scheme w8a8 --calibration python --num-samples 4 --seq-len 64",
    "recover": "--tokens 512 --seq-len 32 --text python",
    "eval": "--tasks none --perplexity python --seq-len 64 --max-blocks 2",
    "compress": f"--model tiny {SMALLER} {EVALUATION}",
    "sweep": f"--models tiny {SMALLER} {EVALUATION} --min-accuracy-retention 0",  # a random model answers no question
    "promote": "--min-accuracy-retention 0 --min-speedup 0 --max-perplexity-ratio 0"  # nor is its speed measured
    " --champion-min-accuracy-retention 0 --champion-min-speedup 0 --champion-max-perplexity-ratio 0",
}
SERVE = ("serve", "bench")
pytestmark = pytest.mark.slow


def smaller(words):
    """The command for the tiny model, with these flags in the place of the document's."""
    words = [word.replace("smollm2", "tiny").replace("MODEL", "tiny") for word in words]
    words = ["600kB" if word == "200MB" else word for word in words]  # of 722 kB
    flags = FLAGS.get(words[0], "").split()
    for flag in flags[::2]:
        if flag in words:
            at = words.index(flag)
            words = words[:at] + words[at + 2 :]
    return words + flags


def run(text):
    """Every command of this document that does not serve; their names."""
    done = [words[1:] for words in commands("slimgpt", text) if words[1] not in SERVE]
    for words in done:
        app(smaller(words), result_action="return_value")
    return {words[0] for words in done}


@pytest.fixture(scope="module")
def place(prefect_server, tmp_path_factory):
    """Where the documents' commands run one after the other, with one registry."""
    place = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMGPT_RUNS", str(place / "runs"))
        patch.delenv("MLFLOW_TRACKING_URI")
        patch.setitem(sys.modules, "vllm", None)  # else compress measures for a minute
        yield place


@pytest.fixture
def folder(place, request, monkeypatch):
    """An empty one for each document, with the dense model in it."""
    folder = place / request.node.name
    folder.mkdir()
    write_dense(folder / "tiny")
    monkeypatch.chdir(folder)
    return folder


def aliases(place):
    found = MlflowClient(f"sqlite:///{place}/runs/mlflow.db").get_registered_model("tiny-slim").aliases
    return {alias: int(version) for alias, version in found.items()}


def document(name):
    return (ROOT / "docs" / name).read_text()


def test_readme(place, folder):
    made = run(README)
    assert made == {
        "prune",
        "recover",
        "quantize",
        "inspect",
        "eval",
        "export",
        "package",
        "compress",
        "promote",
        "sweep",
    }
    assert load_report(folder / "out").ratio == pytest.approx(0.25, abs=0.005)
    assert verify_bundle(folder / "bundle") == []
    assert aliases(place) == {"challenger": 2, "champion": 1}  # the sweep's and compress's


def test_sweep_of_the_page_on_flows(place, folder):
    before = aliases(place)["challenger"]
    assert run(document("flows.md")) == {"sweep"}
    assert aliases(place)["challenger"] == before + 1


def test_registry(place, folder, monkeypatch, capsys):
    assert run(document("registry.md")) == {"promote", "rollback"}
    assert aliases(place)["champion"] == 1  # 2 was, until the rollback
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/runs/mlflow.db")
    mlflow.set_tracking_uri(None)
    (code,) = blocks("python", document("registry.md"))
    capsys.readouterr()
    exec(code.replace("smollm2", "tiny"), {})  # the page's own lines
    assert capsys.readouterr().out.startswith("[")  # a list of texts


def test_serving_page_up_to_the_registry_on_another_machine(folder):
    before = document("deploy.md").partition("## A registry on another machine")[0]
    assert run(before) == {"package", "prune"}
    assert verify_bundle(folder / "bundle") == []
    report = load_report(folder / "out")
    assert all(layer.num_key_value_heads % 2 == 0 for layer in report.layers)  # --head-multiple 2


def test_registry_on_another_machine(folder, monkeypatch):
    text = document("deploy.md").partition("## A registry on another machine")[2]
    (words,) = commands("mlflow", text)
    port = check_port("127.0.0.1", 0)
    words[words.index("--port") + 1] = str(port)
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", *words], stdout=log, stderr=log, start_new_session=True)
    try:
        uri = f"http://127.0.0.1:{port}"
        while True:  # pytest's own time limit bounds it
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{uri}/health", timeout=10).ok:
                    break
            time.sleep(0.2)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert run(text) == {"compress", "quantize", "export", "package"}
        assert verify_bundle(folder / "bundle") == []
        assert Path("slim.gguf").read_bytes()[:4] == b"GGUF"
        assert list(Path("artifacts").rglob("*.safetensors"))  # they went through the server into its folder
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its workers, too
        server.wait(60)
