"""``slimgpt serve`` as its users meet it: one real server and the official client; and how it ends."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import openai
import psutil
import pytest
import torch
from mlflow.entities import LoggedModelStatus
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.engines.availability import vllm_obstacle
from deploy.serving.foreground import _Signals
from deploy.serving.server import check_port, session_members
from tasks.environment import Workspace
from tasks.registry.client import open_client
from tasks.registry.names import MODEL_PATH
from tests.deploy.slim_checkpoint import write_slim
from tests.tiny_families import write_family
from tests.vllm_environment import as_users_have_it

ROOT = Path(__file__).parents[3]
MODEL = "models:/tiny@champion"
KEY = "a key that only the environment holds"
CHAT = [{"role": "user", "content": "What does the if statement do?"}]
START_S = 300.0  # a bound, not an expectation
pytestmark = pytest.mark.vllm
needs_vllm = pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")


def register(folder: Path, runs: Path, name: str = "tiny", aliases: tuple[str, ...] = ("champion",)) -> None:
    """One version of ``name`` in the registry of ``runs``."""
    client = open_client(Workspace.at(runs))
    experiment = client.create_experiment("served", (runs / "mlflow-artifacts").as_uri())
    model_id = client.create_logged_model(experiment, "model").model_id
    client.log_model_artifacts(model_id, str(folder), MODEL_PATH)
    client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    client.create_registered_model(name)
    run_id = client.create_run(experiment).info.run_id
    version = client.create_model_version(name, f"models:/{model_id}", run_id, model_id=model_id)
    for alias in aliases:
        client.set_registered_model_alias(name, alias, version.version)


def start(*words: object, cwd: Path, log: Path, **variables: str) -> subprocess.Popen:
    """``slimgpt serve``, as a user who has set nothing but ``variables`` starts it."""
    # What prepare() chose in this process for another test is no wish of the user of the command.
    env = as_users_have_it(os.environ)
    env = {name: value for name, value in env.items() if name not in ("MLFLOW_TRACKING_URI", "VLLM_API_KEY")}
    command = [sys.executable, "-P", "-m", "slimgpt", "serve", *map(str, words)]
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=env | {"PYTHONPATH": str(ROOT)} | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            # As in a terminal: where these tests run in the background, Ctrl-C is ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def session_of(process: subprocess.Popen) -> int:
    """The leader of the session that vLLM runs in; 0 before it is started."""
    children = [child.pid for child in psutil.Process(process.pid).children() if alive(child.pid)]
    return next((pid for pid in children if os.getsid(pid) == pid), 0)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, what: str, seconds: float = START_S):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.1)
    return found


class Server(NamedTuple):
    process: subprocess.Popen
    log: Path
    port: int
    folder: Path

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(
            **{"base_url": f"http://127.0.0.1:{self.port}/v1", "api_key": KEY, "max_retries": 0, **options}
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """From the registry, in a folder whose own ``deploy`` must not be taken for ours, with spawned workers."""
    place = tmp_path_factory.mktemp("serve")
    folder = write_slim(place / "tiny")
    register(folder, place / "runs")
    (place / "cwd/deploy").mkdir(parents=True)
    (place / "cwd/deploy/__init__.py").write_text("raise RuntimeError('not ours')\n")
    port = check_port("127.0.0.1", 0)
    words = [MODEL, "--runs", place / "runs", "--port", port, "--enforce-eager", "--kvcache-gib", 1]
    words += ["--dtype", "float32", "--", "--max-num-seqs", 64]
    log = place / "log"
    process = start(*words, cwd=place / "cwd", log=log, VLLM_API_KEY=KEY)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        return "\nready on " in log.read_text()

    try:
        wait_for(ready, "the line that says ready")
        yield Server(process, log, port, folder)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def greedy(server):
    """What transformers answers, greedily, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(server.folder)
    model = AutoModelForCausalLM.from_pretrained(server.folder, dtype=torch.float32)

    def answer(ids: list[int], tokens: int) -> str:
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)

    return tokenizer, answer


@needs_vllm
def test_it_says_when_it_is_ready_and_listens_on_this_machine_only(server):
    assert f"ready on http://127.0.0.1:{server.port}/v1 as {MODEL} after " in server.log.read_text()
    listening = {
        connection.laddr.ip
        for pid in session_members(session_of(server.process))
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == server.port
    }
    assert listening == {"127.0.0.1"}


@needs_vllm
def test_the_key_is_in_no_command_line_and_in_no_log(server):
    processes = [server.process.pid, *session_members(session_of(server.process))]
    assert len(processes) >= 4  # slimgpt, the API server, engine and worker
    assert [pid for pid in processes if KEY in " ".join(psutil.Process(pid).cmdline())] == []
    assert KEY not in server.log.read_text()


@needs_vllm
def test_waiting_holds_no_library_of_half_a_gigabyte(server):
    mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in mapped


@needs_vllm
def test_completions_are_those_of_transformers(server, greedy):
    tokenizer, answer = greedy
    prompt = "The if statement is used for"
    done = server.client().completions.create(model=MODEL, prompt=prompt, max_tokens=12, temperature=0)
    assert done.choices[0].text == answer(tokenizer(prompt)["input_ids"], 12) != ""
    assert done.usage.prompt_tokens == len(tokenizer(prompt)["input_ids"])


@needs_vllm
def test_chat_goes_through_the_models_own_template_and_streams_the_same(server, greedy):
    tokenizer, answer = greedy
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    payload = {"model": MODEL, "messages": CHAT, "max_tokens": 12, "temperature": 0}
    done = server.client().chat.completions.create(**payload)
    assert done.choices[0].message.content == answer(ids, 12) != ""
    with server.client().chat.completions.create(**payload, stream=True) as stream:
        pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == done.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1


@needs_vllm
def test_bad_requests_are_refused_with_the_reason_and_the_server_goes_on(server):
    payload = {"model": MODEL, "messages": CHAT, "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="temperature"):
        server.client().chat.completions.create(**payload, temperature=-1)
    with pytest.raises(openai.BadRequestError, match="512"):  # the model's context
        server.client().completions.create(model=MODEL, prompt=[5] * 600, max_tokens=4)
    with pytest.raises(openai.NotFoundError, match="another"):
        server.client().chat.completions.create(**{**payload, "model": "another"})
    for wrong in ("wrong", "none"):
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key=wrong).models.list()
    assert [model.id for model in server.client().models.list()] == [MODEL]


@needs_vllm
def test_64_requests_at_once_are_all_answered(server):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=server.client().base_url, api_key=KEY, max_retries=0) as client:
            payload = {"model": MODEL, "max_tokens": 16, "temperature": 0, "extra_body": {"ignore_eos": True}}
            return await asyncio.gather(
                *(client.completions.create(**payload, prompt=[5 + i, 80, 200 + i]) for i in range(64))
            )

    answers = asyncio.run(ask_all())
    assert [answer.usage.completion_tokens for answer in answers] == [16] * 64
    assert len({answer.choices[0].text for answer in answers}) > 32  # each its own


@needs_vllm
def test_terminating_it_leaves_no_process_and_frees_the_port(server):
    """The last test of this server."""
    members = session_members(session_of(server.process))
    server.process.terminate()
    assert server.process.wait(60) == 128 + signal.SIGTERM
    assert [pid for pid in members if alive(pid)] == []
    assert check_port("127.0.0.1", server.port) == server.port


@needs_vllm
def test_however_it_ends_while_it_starts_nothing_is_left(tmp_path):
    """Ctrl-C, kill -9, and vLLM itself killed (out of memory, say); all at once, to save time."""
    folder = write_slim(tmp_path / "tiny")
    names = ("interrupted", "killed", "orphaned")
    started = [start(folder, "--port", 0, cwd=tmp_path, log=tmp_path / name) for name in names]
    try:
        leaders = [wait_for(lambda p=process: session_of(p), "vLLM's start") for process in started]
        started[0].send_signal(signal.SIGINT)
        started[1].kill()
        os.kill(leaders[2], signal.SIGKILL)
        assert [process.wait(60) for process in started] == [128 + signal.SIGINT, -signal.SIGKILL, 2]
    finally:
        for process in started:
            process.kill()
    wait_for(lambda: not any(map(session_members, leaders)), "the end of every process")
    last = (tmp_path / "orphaned").read_text().splitlines()[-1]
    assert last == "error: vLLM ended with code -9; the lines above say why"


@needs_vllm
def test_a_size_that_does_not_divide_a_layer_is_refused_before_vllm_starts(tmp_path):
    folder = write_slim(tmp_path / "tiny")
    process = start(folder, "--port", 0, "--tensor-parallel-size", 2, cwd=tmp_path, log=tmp_path / "log")
    assert process.wait(120) == 2
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith(
        "error: layer 2 has 3 heads, which tensor parallel size 2 does not divide; sizes that work: 1."
    )


@needs_vllm
def test_it_says_which_bos_prompts_need_where_the_tokenizer_lost_the_habit(tmp_path):
    folder = write_family(tmp_path / "gemma", "gemma2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(1)
    tokenizer.save_pretrained(folder)
    process, log = start(folder, "--port", 0, cwd=tmp_path, log=tmp_path / "log"), tmp_path / "log"
    try:
        wait_for(lambda: "PROMPT" in log.read_text(), "the line about BOS")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert f"send {tokenizer.bos_token}PROMPT" in log.read_text().replace("\n", " ")


def test_a_second_signal_waits_for_no_polite_end():
    """The leader is stopping and its child refuses to: the second Ctrl-C kills both."""
    stubborn = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"ready\n"
    signals = _Signals()
    signals.leader = process.pid
    signals.note(signal.SIGINT)
    assert process.poll() is None
    signals.note(signal.SIGINT)
    assert process.wait(30) == -signal.SIGKILL
