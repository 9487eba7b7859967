"""Start ``vllm serve``, wait until it answers, and leave no process behind however this one ends.

with serving(Path("out"), ServeConfig(), log=Path("vllm.log")) as server:
    requests.post(f"{server.url}/v1/completions", json={"model": server.model_name, "prompt": "Hello"})
"""

import contextlib
import errno
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from deploy.engines import vllm_entry
from deploy.engines.availability import model_obstacle, serves_on_cpu, vllm_obstacle
from deploy.serving.health import healthy, url_of
from slimgpt.checkpoints.weight_files import weight_files
from slimgpt.config import check_limits, option
from slimgpt.equal_bits import without_request

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 10.0
# vLLM reads it; on the command line every user of the machine could read it.
API_KEY = "VLLM_API_KEY"
# Options of vLLM that would work against ours, and what to use instead.
_NOT_EXTRA = {
    "--host": "--host before --",
    "--port": "--port before --",
    "--model": "MODEL before --",
    "--served-model-name": "--name before --",
    "--tensor-parallel-size": "--tensor-parallel-size before --",
    "-tp": "--tensor-parallel-size before --",
    "--api-key": f"the environment variable {API_KEY}: command lines can be read by every user of the machine",
}
STOP_TIMEOUT_S = 20.0

_CAUSE = re.compile(r"\b\w*(Error|Exception): |failed with error")
_NO_CAUSE = re.compile(r"Engine core init|\b(WARNING|INFO|DEBUG)\b")


class ServerError(OSError):
    """The server did not come up, or a client of it failed; the message ends with the last lines of its log."""


class PortTakenError(ServerError):
    """Another program took a port between its choice and vLLM's start."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a model is served. The defaults suit one server on a machine of its own.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for every network this machine is in.")
    port: int = option(0, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "auto: the checkpoint's own, but bfloat16 (vLLM's choice) where that is float32."
    )
    max_model_len: int = option(0, "Longest prompt plus output in tokens; 0: the model's maximum.", ge=0)
    max_num_seqs: int = option(0, "Requests computed together; 0: vLLM's own choice.", ge=0)
    enforce_eager: bool = option(False, "Skip torch.compile and CUDA graphs: faster start, slower generation.")
    tensor_parallel_size: int = option(
        1, "GPUs (on CPU: processes) that share every layer, whose heads and FFN width it must divide.", ge=1
    )
    kvcache_gib: int = option(4, "On CPU: memory for the KV cache, GiB.", ge=1)
    gpu_memory_utilization: float = option(
        0.0, "Share of the GPU's memory (on CPU: of the machine's) to use; 0: 0.9 on GPU, 0.3 on CPU.", ge=0, le=1
    )
    trust_remote_code: bool = option(False, "Run the code in the checkpoint: needed only without the slimgpt plugin.")
    extra: tuple[str, ...] = option((), "More options, passed to vllm serve as they are.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", tuple(self.extra))  # JSON and YAML bring lists
        check_limits(self)
        for word in (word.partition("=")[0] for word in self.extra):
            long = word.replace("_", "-") if word.startswith("--") and word != "--" else ""
            for refused, instead in _NOT_EXTRA.items():
                if word == refused or (long and refused.startswith(long)):  # vLLM takes --api_key and --api-k as well
                    raise ValueError(f"{word} is not passed on to vLLM; use {instead}")


@dataclass(frozen=True)
class RunningServer:
    """A server that has answered. ``start_seconds`` is from the command to the first healthy answer."""

    url: str
    model_name: str
    pid: int
    log: Path
    start_seconds: float


def serve_command(model: Path, config: ServeConfig, *, port: int, served_name: str) -> list[str]:
    """The ``vllm serve`` command line, started through ``deploy.engines.vllm_entry`` wherever the caller's cwd is."""
    # -P keeps a folder named deploy in the caller's cwd from being taken for ours.
    command = [sys.executable, "-P", "-m", "deploy.engines.vllm_entry", "serve", str(model)]
    command += ["--host", config.host, "--port", str(port), "--served-model-name", served_name, "--dtype", config.dtype]
    share = config.gpu_memory_utilization or (0.3 if serves_on_cpu() else 0.9)
    command += ["--gpu-memory-utilization", str(share)]
    if config.tensor_parallel_size > 1:
        command += ["--tensor-parallel-size", str(config.tensor_parallel_size)]
    if config.max_model_len:
        command += ["--max-model-len", str(config.max_model_len)]
    if config.max_num_seqs:
        command += ["--max-num-seqs", str(config.max_num_seqs)]
    if config.enforce_eager:
        command.append("--enforce-eager")
    if config.trust_remote_code:
        command.append("--trust-remote-code")
    return [*command, *config.extra]


def child_environment(config: ServeConfig | None = None) -> dict[str, str]:
    """This process's environment plus what vLLM needs: no statistics sent, our plugin only, no hub, death with us."""
    env = without_request(os.environ) | {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_PLUGINS": "slimgpt",
        "HF_HUB_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",  # vLLM inspects classes in a python -m of its own, where a folder named deploy would win
        vllm_entry.PARENT_PID: str(os.getpid()),
    }
    if config and serves_on_cpu():
        env["VLLM_CPU_KVCACHE_SPACE"] = str(config.kvcache_gib)
        # vLLM 0.32 cannot load what it compiled ahead of time for a CPU, and would compile again at each start.
        env.setdefault("VLLM_USE_AOT_COMPILE", "0")
    return env


def start_session(command: list[str], env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, which ``stop_session`` ends as a whole; it writes to ``log``."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


def check_port(host: str, port: int) -> int:
    """The port to listen on: ``port`` itself if it is free, any free one if it is 0.

    Raises:
        ValueError: if the port is in use or may not be listened on.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((host, port))
        except OSError as e:
            raise ValueError(
                f"port {port} on {host} cannot be used ({e.strerror}); choose another port, or 0 for a free one"
            ) from None
        return int(probe.getsockname()[1])


def check_servable(model: Path) -> None:
    """Raise ValueError unless vLLM can run here and ``model`` is the folder of a complete model that it takes."""
    if reason := vllm_obstacle() or model_obstacle(model):
        raise ValueError(reason)
    weight_files(model)


@contextlib.contextmanager
def serving(
    model: Path, config: ServeConfig, *, log: Path, served_name: str = "", timeout_s: float = 900
) -> Iterator[RunningServer]:
    """Serve ``model`` while the block runs.

    The server runs in a session of its own, which is killed entirely at the end. If this process is killed, or the
    thread that entered the block ends, the kernel kills the server too (Linux). It asks for no API key: it is meant for
    this process alone. A start that found its port taken meanwhile is tried once more; no other failure is.

    Args:
        model: folder of a checkpoint.
        config: how to serve it.
        log: file for everything vLLM prints; an older one is overwritten.
        served_name: the model's name in requests; the folder's name where empty.
        timeout_s: how long to wait for the first healthy answer, seconds.

    Raises:
        ValueError: before anything starts: no vLLM here, not a checkpoint, the port in use.
        ServerError: the server ended or stayed silent; the message ends with the last lines of its log.
    """
    check_servable(model)
    served_name = served_name or model.resolve().name
    env = child_environment(config)
    env.pop(API_KEY, None)
    log.parent.mkdir(parents=True, exist_ok=True)
    for again in (True, False):
        port, server, started = check_port(config.host, config.port), None, time.monotonic()
        url = url_of(config.host, port)
        process = start_session(serve_command(model.resolve(), config, port=port, served_name=served_name), env, log)
        try:
            _wait_for_health(process, url, log, served_name, timeout_s)
            server = RunningServer(url, served_name, process.pid, log, time.monotonic() - started)
            yield server
            return
        except PortTakenError:
            if server or not again:
                raise
            logger.warning("a port was taken while vLLM started with %s: started once more", served_name)
        finally:
            stop_session(process)


def stop_session(process: subprocess.Popen[bytes], timeout_s: float = STOP_TIMEOUT_S) -> None:
    """End ``process`` and everything in the session it leads: politely, then by force, then wait until it is gone.

    Its memory and port are free when this returns.

    Raises:
        ServerError: if a process is still there after ``timeout_s`` more seconds (stuck in the kernel).
    """
    if process.poll() is None:
        process.terminate()
        # A second interrupt during this wait must not leave the session alive.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout_s)
    # The leader may be gone while its engine and workers are still ending, or hold on to their memory.
    _wait_until_gone(process.pid, timeout_s if process.poll() is not None else 0)
    # By force, but multiprocessing's trackers after the rest: their last act is to remove shared memory files.
    for pid in session_members(process.pid, but="multiprocessing.resource_tracker"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _wait_until_gone(process.pid, timeout_s / 4)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if not _wait_until_gone(process.pid, timeout_s):
        left = session_members(process.pid)
        raise ServerError(f"processes {left} of the vLLM server {process.pid} did not end within {timeout_s:.0f} s")
    process.wait(timeout_s)


def session_members(leader: int, *, but: str = "") -> list[int]:
    """Pids of the live processes in the session that ``leader`` leads, without those whose command line holds ``but``.

    A zombie holds nothing and does not count.
    """
    members = []
    for candidate in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(candidate.pid) != leader or candidate.status() == psutil.STATUS_ZOMBIE:
                continue
            if not but or but not in " ".join(candidate.cmdline()):
                members.append(candidate.pid)
    return members


def _wait_until_gone(leader: int, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while session_members(leader):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def log_tail(log: Path, lines: int = 15) -> str:
    """The end of a log, led by its first line that names an error: those that follow are mostly of its making."""
    text = log.read_text(errors="replace").splitlines() if log.is_file() else []
    causes = [line for line in text if _CAUSE.search(line) and not _NO_CAUSE.search(line)]
    return "\n".join([*causes[:1], f"last lines of {log}:", *text[-lines:]])


def _wait_for_health(process: subprocess.Popen[bytes], url: str, log: Path, name: str, timeout_s: float) -> None:
    started = time.monotonic()
    next_progress = PROGRESS_EVERY_S
    while (waited := time.monotonic() - started) < timeout_s:
        # First whether it lives: another program on the port must not answer for a dead server.
        if (code := process.poll()) is not None:
            # vLLM listens seconds after a port was found free, and finds ports for its own processes the same way.
            taken = os.strerror(errno.EADDRINUSE).lower() in log.read_text(errors="replace").lower()
            failure = PortTakenError if taken else ServerError
            raise failure(f"vLLM ended with code {code} before {name} could be served; {log_tail(log)}")
        if healthy(url):
            return
        if waited > next_progress:
            last = log.read_text(errors="replace").splitlines()[-1:] or ["(nothing logged yet)"]
            logger.info("waiting for %s, %.0f s: %s", name, waited, last[0][:120])
            next_progress += PROGRESS_EVERY_S
        time.sleep(0.25)
    raise ServerError(f"{name} did not answer within {timeout_s:.0f} s; {log_tail(log)}")
