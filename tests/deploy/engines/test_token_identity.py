"""One checkpoint, three engines, the same greedy tokens in float32: transformers, stock vLLM, vLLM with our plugin.

Two real ``vllm serve``: by ``serving()`` in a process that is then killed, and by a bundle's serve.sh where no package
of ours can be imported.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.bundle.folder import verify_bundle, write_bundle
from deploy.engines.availability import vllm_obstacle
from deploy.serving.server import check_port, session_members, stop_session
from tests.deploy.slim_checkpoint import write_slim
from tests.vllm_environment import as_users_have_it

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here"),
]

PROMPTS = [
    "The if statement is used for",
    "x = [1, 2, 3]\n",
    "A",
    "Classes and functions, " * 20,
    "def main():\n    return 0",
]
NEW_TOKENS = 24
START_S = 300.0  # a bound, not an expectation

# Enters serving() and stays: the test kills it.
PARENT = """
import json, sys, time
from pathlib import Path
from deploy.serving.server import ServeConfig, serving

config = ServeConfig(dtype="float32", enforce_eager=True, kvcache_gib=1)
with serving(Path(sys.argv[1]), config, log=Path(sys.argv[2]), served_name="m", timeout_s=300) as server:
    print(json.dumps({"url": server.url, "pid": server.pid}), flush=True)
    time.sleep(3600)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_slim(tmp_path_factory.mktemp("models") / "slim")


@pytest.fixture(scope="module")
def prompts(checkpoint: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates, greedily, in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as ignore_eos in vLLM
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)  # prompts matter, or identity would mean little
    return answers


def served_tokens(url: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations from a server, as token ids, all prompts in one batch."""
    payload = {
        "model": "m",
        "prompt": prompts,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(payload).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        choices = json.load(answer)["choices"]
    return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_plugin_serves_the_same_tokens_and_dies_with_its_parent(checkpoint, prompts, expected, tmp_path):
    log = tmp_path / "vllm.log"
    command = [sys.executable, "-P", "-c", PARENT, str(checkpoint), str(log)]
    env = as_users_have_it(os.environ)
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as parent:
        try:
            line = parent.stdout.readline()  # ends when the server answers or serving() gives up
            assert line, log.read_text()[-3000:]
            server = json.loads(line)
            assert served_tokens(server["url"], prompts) == expected
            assert "llama, mistral, phi3 by native classes" in log.read_text()
            assert "TransformersForCausalLM" not in log.read_text()
            members = session_members(server["pid"])
            assert len(members) >= 3  # API server, engine core, worker
        finally:
            parent.send_signal(signal.SIGKILL)  # no finally block of ours runs now
    deadline = time.monotonic() + 30
    while any(map(alive, members)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [pid for pid in members if alive(pid)] == []
    port = int(server["url"].rsplit(":", 1)[1])
    assert check_port("127.0.0.1", port) == port


def test_bundle_serves_the_same_tokens_on_stock_vllm(checkpoint, prompts, expected, tmp_path, stock_python):
    """The floor: serve.sh, vLLM's Transformers backend, --trust-remote-code, nothing of ours installed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for package in ("slimgpt", "deploy"):
        found = subprocess.run(
            [stock_python, "-c", f"import {package}"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert f"No module named '{package}'" in found.stderr
    bundle = write_bundle(checkpoint, tmp_path / "bundle", name="m")
    port = check_port("127.0.0.1", 0)
    env |= {
        "PYTHON": str(stock_python),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "VLLM_PLUGINS": "",
    }
    # vLLM's dtype auto would make bfloat16 of a float32 checkpoint.
    command = [bundle / "serve.sh", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    log = tmp_path / "stock.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                tokens = served_tokens(f"http://127.0.0.1:{port}", prompts)
                break
            except OSError:
                time.sleep(0.5)
    finally:
        stop_session(process)
    assert tokens == expected
    assert "TransformersForCausalLM" in log.read_text()
    assert session_members(process.pid) == []
    assert verify_bundle(bundle) == []  # serving wrote nothing into it
