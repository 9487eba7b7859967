"""The process that runs vLLM's benchmark command: exit codes and logs of its runs, time limits, its own end."""

import os
import signal

import psutil
import pytest

from deploy.bench.client import bench_client
from deploy.engines.availability import vllm_obstacle
from deploy.serving.server import ServerError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here"),
]


def test_runs_one_after_the_other_each_with_its_log_and_the_end_of_the_process(tmp_path):
    with bench_client(tmp_path / "client.log") as client:
        assert client.run(["--help"], tmp_path / "help.log", 120) == 0
        assert "--request-rate" in (tmp_path / "help.log").read_text()
        assert client.run(["--no-such-option"], tmp_path / "wrong.log", 60) == 2
        assert "--no-such-option" in (tmp_path / "wrong.log").read_text()
        waiting = ["--model", "m", "--base-url", "http://127.0.0.1:9", "--ready-check-timeout-sec", "60"]
        waiting += ["--tokenizer", str(tmp_path), "--dataset-name", "random"]
        code = client.run(waiting, tmp_path / "no-tokenizer.log", 60)
        assert code == 1 and "Traceback" in (tmp_path / "no-tokenizer.log").read_text()
        os.kill(client.process.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match="the process that runs vllm bench serve ended"):
            client.run(["--help"], tmp_path / "after.log", 60)


def test_a_run_past_its_time_ends_with_the_block(tmp_path):
    with (
        pytest.raises(ServerError, match=r"did not end within 0 s; .*last lines of .*late[.]log"),
        bench_client(tmp_path / "client.log") as client,
    ):
        client.run(["--help"], tmp_path / "late.log", 0.2)
    assert not psutil.pid_exists(client.process.pid)
