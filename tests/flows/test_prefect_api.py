"""A Prefect server that is not there, or goes away: one line in seconds, nothing lost, nothing left running."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deploy.serving.server import check_port, stop_session
from flows.prefect_api import reached
from slimgpt.report import load_report
from tests.tiny_models import write_dense

ROOT = Path(__file__).parents[2]
SMALL = (
    "--num-samples 4 --seq-len 64 --calibration python --ffn-multiple 4 --evaluation.tasks none "
    "--evaluation.perplexity python --evaluation.seq-len 64 --evaluation.max-blocks 2"
)


def environment(place, **variables):
    """A user's: nothing that this process's own Prefect and MLflow need; no vLLM, which is not what this is about."""
    user = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    (place / "site").mkdir(exist_ok=True)
    (place / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    path = os.pathsep.join((str(place / "site"), str(ROOT)))
    ours = {"PREFECT_HOME": str(place / "prefect"), "SLIMGPT_RUNS": str(place / "runs"), "PYTHONPATH": path}
    return {**user, **ours, **variables}


def compress(place, dense, **variables):
    """``slimgpt compress`` as a user starts it."""
    command = [sys.executable, "-P", "-m", "slimgpt", "compress", "--model", str(dense), *SMALL.split()]
    with (place / "log").open("w") as log:
        own = {"cwd": place, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(command, env=environment(place, **variables), **own)


def wait_for(condition, what, process, log):
    while not condition():  # pytest's own time limit bounds it
        assert process.poll() is None, f"{what} did not come; {log.read_text()[-3000:]}"
        time.sleep(0.01)


def test_the_first_run_needs_neither_home_nor_proxy_and_warns_of_nothing_but_what_is_skipped(tmp_path):
    """A container's user has no folder of its own; a company's proxy answers nothing for 127.0.0.1.

    Prefect's own server and MLflow's loader used to warn of what was meant to be so.
    """
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    user = {"HOME": "/proc", "PREFECT_HOME": "/proc/prefect", "NO_PROXY": "localhost", **proxy}
    assert compress(tmp_path, write_dense(tmp_path / "tiny"), **user).wait(300) == 0, (tmp_path / "log").read_text()[
        -3000:
    ]
    assert list((tmp_path / "runs").rglob("temporary-server.db"))
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if "challenger" in line]
    # Prefect says that it has no home, in two lines.
    meant = ("vLLM", "Failed to create the Prefect home directory", "warnings.warn(")
    assert [line for line in lines if "warning" in line.lower() and not any(word in line for word in meant)] == []
    assert [line for line in lines if "INFO mlflow" in line] == []


def test_an_address_without_api_says_so():
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4377/"}),
        pytest.raises(ConnectionError, match=r"does not end in /api: set it to http://127.0.0.1:4377/api$"),
        reached(),
    ):
        pytest.fail("the flow has begun")


@pytest.mark.skipif(find_spec("socksio") is not None, reason="with socksio such a proxy can be used")
def test_a_proxy_that_the_client_cannot_use_is_named(monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5://me:planted0word@127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "localhost,127.0.0.1")
    expected = r"the proxy for 'all' is socks5://127.0.0.1:9 \(all_proxy\).*pip install socksio"
    with pytest.raises(ValueError, match=expected), reached():
        pytest.fail("the flow has begun")


def unanswered(url, why):
    """What is said of a server that does not answer."""
    return (
        f"Prefect at {url.replace('user:planted0word@', '')} does not answer ({why}); start it, correct "
        "PREFECT_API_URL, or unset it (prefect config unset PREFECT_API_URL), as no server is needed"
    )


@pytest.mark.parametrize("runs", ["file", "link", "file/below"])
def test_a_folder_of_runs_that_cannot_be_is_one_line_and_not_minutes_without_a_server(runs, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    dense = write_dense(tmp_path / "dense")
    process = compress(tmp_path, dense, SLIMGPT_RUNS=str(tmp_path / runs))
    assert process.wait() == 2
    said = (tmp_path / "log").read_text()
    assert len(said.splitlines()) == 1
    assert re.search(rf"error: {tmp_path / runs}.* cannot be written to \(.*\); choose another folder", said)


def test_a_temporary_server_that_does_not_start_is_one_last_line_with_a_remedy(tmp_path):
    broken = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path}/not/there.db"}
    broken["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "1"  # given up before it says what is wrong
    process = compress(tmp_path, write_dense(tmp_path / "dense"), **broken)
    assert process.wait() == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: Prefect's temporary server did not start (Timed out")


ALONE = """
from flows import prefect_api as api
from slimgpt.files import locked
folder, begin = api._folder(api.get_current_settings()), api.OwnServer._begin
def begins(server):
    try:
        with locked(folder):
            print("another may begin", flush=True)
    except BlockingIOError:
        print("no other begins", flush=True)
    begin(server)
api.OwnServer._begin = begins
with api.reached(), locked(folder):
    print("others may begin", flush=True)
"""


def test_a_command_makes_its_servers_database_alone(tmp_path):
    """Of two first commands that begin together one ended: both servers made the same tables."""
    command = [sys.executable, "-P", "-c", ALONE]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["no other begins", "others may begin"], done.stderr


def test_a_damaged_database_of_the_temporary_server_is_named_before_it_starts(tmp_path):
    """The server was waited for, two minutes long, after it had ended, and the error named no file."""
    file = tmp_path / "runs" / "prefect-results" / "temporary-server.db"
    file.parent.mkdir(parents=True)
    file.write_bytes(os.urandom(5000))
    process = compress(tmp_path, write_dense(tmp_path / "dense"))
    assert process.wait() == 2
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith(f"error: the database of Prefect's temporary server, {file}, is damaged (file is not a data")
    assert "remove it" in line


def test_a_temporary_server_that_ends_is_waited_for_no_longer(tmp_path):
    """The time limit of this test is shorter than the server's."""
    broken = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{tmp_path}/not/there.db"}
    broken["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "10000"
    process = compress(tmp_path, write_dense(tmp_path / "dense"), **broken)
    assert process.wait() == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: Prefect's temporary server did not start (it ended with exit code")


def test_a_server_that_is_not_there_is_one_line_before_any_work(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://user:planted0word@127.0.0.1:{taken.getsockname()[1]}/api"
        assert compress(tmp_path, write_dense(tmp_path / "tiny"), PREFECT_API_URL=url).wait(120) == 2
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line == f"error: {unanswered(url, '[Errno 111] Connection refused')}"
    assert not (tmp_path / "runs").exists()


def test_a_server_that_listens_and_says_nothing_is_given_up():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"http://user:planted0word@127.0.0.1:{taken.getsockname()[1]}/api"
        with (
            temporary_settings({PREFECT_API_URL: url}),
            pytest.raises(ConnectionError, match=re.escape(unanswered(url, "timed out"))),
            reached(),
        ):
            pytest.fail("the flow has begun")


class _HealthAlone(BaseHTTPRequestHandler):
    """As Prefect's server with PREFECT_SERVER_API_AUTH_STRING: its health is everyone's."""

    def do_GET(self):
        self.send_response(200 if self.path == "/api/health" else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_a_server_that_wants_a_login_names_the_variables_for_it():
    """Its health needs none, so the flow began and ended in a traceback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _HealthAlone) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        expected = r"refuses to answer \(401\): set PREFECT_API_AUTH_STRING .* or PREFECT_API_KEY"
        with (
            temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}),
            pytest.raises(PermissionError, match=expected),
            reached(),
        ):
            pytest.fail("the flow has begun")
        server.shutdown()


class PrefectServer:
    """A server that can be killed and started again on the same port and database."""

    def __init__(self, place):
        self.place, self.port = place, int(check_port("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.port}/api"

    def start(self):
        command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(self.port), "--no-ui"]
        with (self.place / "server.log").open("ab") as log:
            own = {"cwd": self.place, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            self.process = subprocess.Popen(command, env=environment(self.place), **own)

        def answers():
            try:
                return urlopen(f"{self.url}/health", timeout=5).status == 200
            except (URLError, OSError):
                return False

        wait_for(answers, "Prefect's answer", self.process, self.place / "server.log")


@pytest.fixture
def server(tmp_path):
    server = PrefectServer(tmp_path)
    server.start()
    yield server
    stop_session(server.process)


@pytest.mark.slow
def test_a_server_killed_in_the_middle_loses_no_layer_and_the_same_command_goes_on(server, tmp_path):
    dense = write_dense(tmp_path / "tiny", num_hidden_layers=6)
    # Prefect's client waits a minute for a server that was there; here one more try.
    variables = {"PREFECT_API_URL": server.url, "PREFECT_CLIENT_MAX_RETRIES": "1"}
    process = compress(tmp_path, dense, **variables)
    wait_for(lambda: list(tmp_path.glob("runs/*/*/model/journal.jsonl")), "the first layer", process, tmp_path / "log")
    os.killpg(server.process.pid, signal.SIGKILL)
    assert process.wait(300) == 2
    said = (tmp_path / "log").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line == (
        f"error: Prefect at {server.url} stopped answering ([Errno 111] Connection refused); finished work is kept: "
        "run the same command again when it is back"
    )
    assert "Traceback" not in said
    (model,) = tmp_path.glob("runs/*/*/model")
    assert len(load_report(model).layers) == 6  # pruning needs no server
    server.start()
    process = compress(tmp_path, dense, **variables)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert "nothing is made again" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_without_a_server_the_temporary_one_ends_with_a_flow_that_is_killed(tmp_path):
    process = compress(tmp_path, write_dense(tmp_path / "tiny"))
    flow = psutil.Process(process.pid)
    wait_for(lambda: "Beginning flow run" in (tmp_path / "log").read_text(), "a start", process, tmp_path / "log")
    children = flow.children(recursive=True)
    assert any("flows.prefect_server" in child.cmdline() for child in children)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(children, timeout=20)
    assert left == []
