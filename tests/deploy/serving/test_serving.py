"""Starting and stopping servers without a whole vLLM start; test_token_identity.py and test_benchmark.py have those."""

import contextlib
import dataclasses
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from deploy.engines.availability import vllm_obstacle
from deploy.serving.health import healthy
from deploy.serving.server import (
    ServeConfig,
    ServerError,
    check_port,
    serve_command,
    serving,
    session_members,
    stop_session,
)
from tests.deploy.slim_checkpoint import write_dense

needs_vllm = pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.mark.parametrize(
    ("field", "value"),
    [("port", 70000), ("port", -1), ("dtype", "int3"), ("gpu_memory_utilization", 1.5), ("kvcache_gib", 0)],
)
def test_settings_outside_their_limits_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        ServeConfig(**{field: value})


@needs_vllm
def test_a_port_in_use_is_refused_before_anything_starts(model: Path, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 cannot be used .*choose another port"),
            serving(model, ServeConfig(port=port), log=tmp_path / "log"),
        ):
            pass
    assert not (tmp_path / "log").exists()
    assert check_port("127.0.0.1", port) == port


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n"]
)
def test_a_program_that_speaks_no_http_is_no_healthy_server(answer: bytes):
    """http.client's BadStatusLine is no OSError; it would end the wait for the server in a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def speak() -> None:
            caller, _ = other.accept()
            with caller:
                caller.recv(4096)
                caller.sendall(answer)

        thread = threading.Thread(target=speak)
        thread.start()
        assert not healthy(f"http://127.0.0.1:{other.getsockname()[1]}")
        thread.join()


@needs_vllm
@pytest.mark.parametrize(("missing", "words"), [("config.json", "no config.json"), ("*.safetensors", "no .*weights")])
def test_a_folder_that_is_no_checkpoint_is_refused(model: Path, tmp_path: Path, missing, words):
    for file in model.iterdir():
        if not file.match(missing):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=words), serving(tmp_path, ServeConfig(), log=tmp_path / "log"):
        pass


@needs_vllm
def test_a_server_that_dies_is_reported_with_its_last_words(model: Path, tmp_path: Path):
    config = ServeConfig(extra=("--no-such-option",))
    with pytest.raises(ServerError, match="ended with code 2(.|\n)*unrecognized arguments: --no-such-option"):  # noqa: SIM117
        with serving(model, config, log=tmp_path / "vllm.log", timeout_s=300):
            pass


@needs_vllm
def test_a_silent_server_is_given_up_and_ended(model: Path, tmp_path: Path):
    with pytest.raises(ServerError, match="did not answer within 1 s"):  # noqa: SIM117
        with serving(model, ServeConfig(), log=tmp_path / "vllm.log", timeout_s=1):
            pass
    assert [
        child.cmdline() for child in psutil.Process().children() if "deploy.engines.vllm_entry" in child.cmdline()
    ] == []


def test_stopping_ends_a_session_that_ignores_terminate():
    """The leader dies politely; its child refuses and must be killed, else its memory would stay taken."""
    child = "import signal as s, time; s.signal(s.SIGTERM, s.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    leader = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", leader], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"ready\n"
    assert len(session_members(process.pid)) == 2
    stop_session(process, timeout_s=2)
    assert session_members(process.pid) == []
    assert process.returncode == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_stopping_by_force_leaves_no_shared_memory():
    """Only multiprocessing's tracker removes a killed process's shared memory, so it must outlive the killing."""
    leader = (
        "import signal as s, time; from multiprocessing.shared_memory import SharedMemory as M;"
        "s.signal(s.SIGTERM, s.SIG_IGN); print(M(create=True, size=4096).name, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", leader], stdout=subprocess.PIPE, start_new_session=True)
    shared = Path("/dev/shm") / process.stdout.readline().decode().strip().lstrip("/")
    assert shared.is_file()
    stop_session(process, timeout_s=2)
    assert process.returncode == -signal.SIGKILL
    assert not shared.exists()


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (("--api-key", "k"), "VLLM_API_KEY"),
        (("--api_key=k",), "VLLM_API_KEY"),
        (("--seed", "1", "--api-k", "k"), "VLLM_API_KEY"),
        (("--port=1",), "--port before --"),
        (("--model", "other"), "MODEL before --"),
        (("-tp", "2"), "--tensor-parallel-size before --"),
        (("--served_model_name", "n"), "--name before --"),
    ],
)
def test_options_that_would_work_against_ours_are_refused(words, instead):
    with pytest.raises(ValueError, match=f"is not passed on to vLLM; use .*{instead}"):
        ServeConfig(extra=words)
    assert ServeConfig(extra=("--model-impl", "auto", "--api-server-count", "1")).extra


def test_the_command_names_every_option(tmp_path: Path):
    config = ServeConfig(dtype="float32", max_model_len=99, max_num_seqs=3, enforce_eager=True, extra=("--seed", "7"))
    split = dataclasses.replace(config, tensor_parallel_size=2)
    words = " ".join(serve_command(tmp_path, config, port=1234, served_name="m"))
    assert f"serve {tmp_path} --host 127.0.0.1 --port 1234 --served-model-name m --dtype float32" in words
    assert words.endswith("--max-model-len 99 --max-num-seqs 3 --enforce-eager --seed 7")
    assert "--trust-remote-code" not in words and "--tensor-parallel-size" not in words
    assert "--tensor-parallel-size 2" in " ".join(serve_command(tmp_path, split, port=1234, served_name="m"))


@pytest.mark.slow
@needs_vllm
def test_a_port_taken_before_vllm_listens_on_it_costs_one_more_start(model: Path, tmp_path: Path, caplog):
    """vLLM listens seconds after the port was found free: time enough for a thread that looks at its command line."""
    stolen: list[socket.socket] = []

    def steal() -> None:
        while not stolen:
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error, ValueError):
                    words = child.cmdline()
                    port = int(words[words.index("--port") + 1])
                    stolen.append(socket.create_server(("127.0.0.1", port)))

    thief = threading.Thread(target=steal, daemon=True)
    thief.start()
    config = ServeConfig(enforce_eager=True, kvcache_gib=1, dtype="float32")
    with serving(model, config, log=tmp_path / "vllm.log") as server:
        (taken,) = stolen
        assert healthy(server.url)
        assert not server.url.endswith(f":{taken.getsockname()[1]}")
        taken.close()
    assert [record.message for record in caplog.records if "port was taken" in record.message] == [
        "a port was taken while vLLM started with dense: started once more"
    ]


@pytest.mark.slow
@needs_vllm
def test_a_model_that_cannot_be_loaded_is_not_tried_again(model: Path, tmp_path: Path, caplog):
    folder = shutil.copytree(model, tmp_path / "broken")
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    config = ServeConfig(enforce_eager=True, kvcache_gib=1, dtype="float32")
    with pytest.raises(ServerError, match="ended with code"):  # noqa: SIM117
        with serving(folder, config, log=tmp_path / "vllm.log"):
            pass
    assert "started once more" not in caplog.text
