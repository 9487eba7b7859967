"""``vllm bench serve`` for the many runs of a benchmark: a process that imports vLLM once, and forks for each of them.

    python -m deploy.bench.client

The import takes ten seconds of a core, a run of thirty requests often fewer. Each line of standard input asks for a
run, as JSON: ``arguments`` of the command and its ``log``. The answer is a line with its exit code.
"""

import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from deploy.engines import vllm_entry
from deploy.serving.server import ServerError, child_environment, log_tail, stop_session


@dataclass(frozen=True)
class BenchClient:
    """The process, as the benchmark sees it."""

    process: subprocess.Popen[bytes]
    log: Path

    def run(self, arguments: list[str], log: Path, timeout_s: float) -> int:
        """One run, whose output goes to ``log``; returns its exit code.

        Raises:
            ServerError: it did not end within ``timeout_s`` seconds, or the process itself ended.
        """
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"arguments": arguments, "log": str(log)}).encode() + b"\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], timeout_s)[0]:
                raise ServerError(f"vllm bench serve did not end within {timeout_s:.0f} s; {log_tail(log)}")
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer:
            raise ServerError(f"the process that runs vllm bench serve ended; {log_tail(self.log)}")
        return int(answer)


@contextmanager
def bench_client(log: Path) -> Iterator[BenchClient]:
    """Start the process, which ends with the block; what it says outside of its runs goes to ``log``."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "deploy.bench.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=child_environment(),
            start_new_session=True,
        )
    try:
        yield BenchClient(process, log)
    finally:
        stop_session(process)
        for pipe in (process.stdin, process.stdout):
            assert pipe
            pipe.close()


def serve_runs() -> None:
    """Import vLLM, and run what standard input asks for until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes its log to standard output
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    for line in sys.stdin:
        wanted: dict[str, Any] = json.loads(line)
        if (child := os.fork()) == 0:
            _run(lambda arguments: main(parser.parse_args(arguments)), wanted["arguments"], wanted["log"])
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


def _run(command: Callable[[list[str]], object], arguments: list[str], log: str) -> NoReturn:
    """Run the command with its output in ``log``, and leave without the parent's clean-up."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        command(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    vllm_entry.collect_seldom()
    vllm_entry.answer_vllm_version()
    vllm_entry.die_with_parent()
    serve_runs()
