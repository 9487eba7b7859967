"""Every `slimgpt serve`, `slimgpt bench` and `curl` of README and docs, run with real vLLM on tiny models.

Replaced are names of models and ports; added is what makes vLLM start sooner.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from deploy.engines.availability import vllm_obstacle
from tests import vllm_environment
from tests.deploy.slim_checkpoint import write_dense, write_slim
from tests.flows.cli.test_serve import KEY, ROOT, register, start, wait_for
from tests.flows.documents.test_readme import DOCS, README, commands
from tests.hub_server import Hub

pytestmark = [
    pytest.mark.all,
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.minutes,
    pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here"),
]
SOONER = ["--enforce-eager", "--kvcache-gib", "1"]
CURL = re.findall(r"^(?:\$ )?(curl (?:.*\\\n)*.*)$", README + DOCS, flags=re.MULTILINE)
AT_ONCE = 2  # servers that are started at the same time: 3 GB each


def lines(command):
    """The documents' lines of this command, as words after its name."""
    return [words[2:] for words in commands("slimgpt", README + DOCS) if words[1] == command]


def smaller(words):
    """On a free port, with a context that a tiny model has, and started sooner."""
    words = list(words)
    for flag, value in (("--port", "0"), ("--max-model-len", "256")):
        if flag in words:
            words[words.index(flag) + 1] = value
    if "--port" not in words:
        words[1:1] = ["--port", "0"]
    words[1:1] = SOONER
    return words


def telling(wanted):
    """Each once, without those whose every word another has: a model with fewer options, the one alias or the other."""
    wanted = {tuple(word.replace("@challenger", "@champion") for word in words) for words in wanted}
    return sorted(words for words in wanted if not any(set(words) < set(other) for other in wanted))


def curl(url, name):
    """Ask what the documents ask a model of this name, and answer with those lines; every server here wants the key."""
    env = {**os.environ, "VLLM_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    mine = [line for line in CURL if '"model"' not in line or f'"{name}"' in line]
    for line in mine:
        here = re.sub(r"http://127.0.0.1:\d+/v1", url, line) + " -sS --fail-with-body"
        if "$VLLM_API_KEY" not in line:
            here += ' -H "Authorization: Bearer $VLLM_API_KEY"'
        done = subprocess.run(["bash", "-c", here], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        answer = json.loads(done.stdout)
        assert answer["data"][0]["id"] == name if "data" in answer else answer["usage"]["completion_tokens"] == 12
    return mine


@pytest.fixture
def place(tmp_path):
    write_slim(tmp_path / "MODEL")
    write_slim(tmp_path / "out", widths=[(6, 2, 96), (4, 4, 128)])  # as --head-multiple 2 leaves it
    register(tmp_path / "MODEL", tmp_path / "runs", "smollm2-slim", ("challenger", "champion"))
    return tmp_path


def test_serve_commands_serve(place):
    files = {path.name: path.read_bytes() for path in (place / "MODEL").iterdir()}
    asked_by_curl = set()
    with Hub() as hub:
        commit = hub.push("org/model", files)
        hub.repos["models", "org/model"].refs["4fa2b1c"] = commit
        user = {"SLIMGPT_RUNS": str(place / "runs"), "HF_ENDPOINT": hub.url, "HF_HOME": str(place / "hf")}
        user |= vllm_environment.QUICK  # bound to cores, two ranks would want two NUMA nodes
        user |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost", "VLLM_API_KEY": KEY}

        def serve(number, words):
            log = place / f"{number}.log"
            process = start(*words, cwd=place, log=log, **user)

            def ready():
                assert process.poll() is None, log.read_text()[-3000:]
                return re.search(r"\nready on (\S+) as (\S+) after", log.read_text())

            try:
                url, name = wait_for(ready, "the line that says ready").groups()
                with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
                    payload = {"prompt": [5, 80, 200], "max_tokens": 4, "extra_body": {"ignore_eos": True}}
                    assert client.completions.create(model=name, **payload).usage.completion_tokens == 4
                if shutil.which("curl"):
                    asked_by_curl.update(curl(url, name))
                process.terminate()
                assert process.wait(60) == 128 + signal.SIGTERM
            finally:
                process.kill()

        wanted = telling(smaller(words) for words in lines("serve"))
        assert {words[0] for words in wanted} >= {"MODEL", "org/model", "out", "models:/smollm2-slim@champion"}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(serve, range(len(wanted)), wanted))
    if not shutil.which("curl"):
        pytest.skip("all serve; the pages' curl lines were not run, since curl is not installed")
    assert len(asked_by_curl) == len(CURL) >= 2


def test_every_bench_command_measures(place):
    (words,) = lines("bench")
    dense = write_dense(place / "smollm2")
    command = [sys.executable, "-P", "-m", "slimgpt", "bench", *words, *SOONER, "--no-offline", "--load-shares", ""]
    command += ["--no-show-drift", "--pairs", "1", "--num-prompts", "2", "--num-warmups", "1"]
    command += ["--input-len", "16", "--output-len", "32"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((place / "runs" / "bench" / "bench.json").read_text())
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (dense, place / "out")]
    assert [report["footprints"][side]["file_bytes"] for side in ("dense", "pruned")] == sizes
