"""What one machine needs, on loopback: Prefect's server, MLflow's server, and a worker with the deployments registered.

python -m flows.local up         # as often as you like: what runs already is left alone
python -m flows.local status
python -m flows.local down

State, logs and pids lie in one folder: SLIMGPT_RUNS, else ./runs. Ports: PREFECT_PORT, MLFLOW_PORT. A server of your
own is used instead of a local one where PREFECT_API_URL or MLFLOW_TRACKING_URI (http) names it, and PostgreSQL and S3
hold the local ones' state where their variables say so: see docs/flows.md.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from flows import deployments, stores
from flows.flags import light_imports
from tasks.environment import Workspace, prepare

with light_imports("slimgpt", "deploy"):
    from deploy.serving import check_port, log_tail, session_members

PROJECT = Path(__file__).parents[1]
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine is asked, no proxy


@dataclass(frozen=True)
class Service:
    """A process in a session of its own, remembered by pid and start time: pids are used again.

    Args:
        name: also of its log and record.
        folder: for both.
        health: a URL that answers when it is ready; empty where being alive is all there is to ask.
        port: that it listens on; 0 where it does not.
        state: where it keeps its state, for people.
    """

    name: str
    folder: Path
    command: tuple[str, ...] = ()
    health: str = ""
    port: int = 0
    state: str = ""

    @property
    def log(self) -> Path:
        """Everything it prints."""
        return self.folder / f"{self.name}.log"

    @property
    def _record(self) -> Path:
        return self.folder / f"{self.name}.json"

    def pid(self) -> int:
        """Of the running process; 0 where it does not run."""
        try:
            record = json.loads(self._record.read_text())
            process = psutil.Process(record["pid"])
            same = abs(process.create_time() - record["started"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except (OSError, ValueError, psutil.Error):
            return 0
        return int(record["pid"]) if same else 0

    def check(self) -> None:
        """Whether it can be started, or runs as it should.

        Raises:
            ValueError: when another program listens on its port, and would answer in its place; when it runs on
                another state than the environment asks for now.
        """
        if self.pid():
            kept = json.loads(self._record.read_text()).get("state", self.state)
            if kept != self.state:
                raise ValueError(f"{self.name} runs with its state in {kept}; `make down` before it uses {self.state}")
        elif self.port:
            try:
                check_port("127.0.0.1", self.port)
            except ValueError as error:
                why = str(error).partition(";")[0]
                raise ValueError(f"{self.name}: {why}; set {self.name.upper()}_PORT to another") from None

    def start(self, environment: dict[str, str]) -> None:
        """Start it, unless it runs."""
        if self.pid():
            return
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        started = psutil.Process(process.pid).create_time()
        record = {"pid": process.pid, "started": started, "state": self.state}
        self._record.write_text(json.dumps(record))

    def wait(self) -> None:
        """Until it answers.

        Raises:
            OSError: when it ends or stays silent; the message ends with the last lines of its log.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.pid() and time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, OSError):
                if not self.health or _direct.open(self.health, timeout=5).status == 200:
                    return
            time.sleep(0.25)
        what = f"did not answer within {START_TIMEOUT_S:.0f} s" if self.pid() else "ended before it answered"
        raise OSError(f"{self.name} {what}; {log_tail(self.log)}")

    def stop(self) -> bool:
        """End it and all that it started: politely, then by force. Says whether there was anything to end."""
        if not self._record.is_file():
            return False
        pid, leader = self.pid(), int(json.loads(self._record.read_text())["pid"])
        left = session_members(leader)  # a worker that was killed leaves its flow runs behind
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while pid and session_members(leader) and time.monotonic() < deadline:
            time.sleep(0.1)
        for member in session_members(leader):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        while session_members(leader):
            time.sleep(0.05)
        self._record.unlink()
        return bool(left)


@dataclass(frozen=True)
class Local:
    """The services of one machine, and where they are reached."""

    workspace: Workspace
    prefect_url: str
    mlflow_url: str
    services: tuple[Service, ...]

    @classmethod
    def here(cls) -> "Local":
        """As the environment says."""
        workspace = Workspace.at()
        folder = workspace.root / "services"
        prefect_port, mlflow_port = _port("PREFECT_PORT", 4200), _port("MLFLOW_PORT", 5000)
        prefect = os.environ.get("PREFECT_API_URL", "")
        mlflow = os.environ.get("MLFLOW_TRACKING_URI", "")
        services = []
        if not prefect:
            prefect = f"http://127.0.0.1:{prefect_port}/api"
            command = (*_python("flows.prefect_server"), "start", "--host", "127.0.0.1", "--port", str(prefect_port))
            state = stores.described("prefect")
            services.append(Service("prefect", folder, command, f"{prefect}/health", prefect_port, state))
        if not mlflow.startswith(("http:", "https:")):
            mlflow = f"http://127.0.0.1:{mlflow_port}"
            # Where the database and the files are is said by MLFLOW_BACKEND_STORE_URI and MLFLOW_ARTIFACTS_DESTINATION:
            # not on the command line, which every user of the machine can read, passwords included.
            options = f"server --host 127.0.0.1 --port {mlflow_port} --workers 1"
            command = (*_python("mlflow"), *options.split())
            state = stores.described("mlflow")
            services.append(Service("mlflow", folder, command, f"{mlflow}/health", mlflow_port, state))
        command = (
            *_python("prefect"),
            *f"worker start --pool {deployments.POOL} --type process --name local".split(),
        )
        services.append(Service("worker", folder, command))
        return cls(workspace, prefect, mlflow, tuple(services))

    def environment(self) -> dict[str, str]:
        """For the services, and for everybody who talks to them."""
        stores.check_tracking_uri(os.environ.pop("MLFLOW_TRACKING_URI", ""))
        prepare(self.workspace.root)
        root = self.workspace.root
        defaults = {
            "PREFECT_HOME": str(root / "prefect"),
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.workspace.mlflow_database}",
            "MLFLOW_ARTIFACTS_DESTINATION": str(self.workspace.mlflow_artifacts),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for LLM judges, which nothing here uses
            "PREFECT_LOGGING_COLORS": "false",
        }
        ours = {
            "SLIMGPT_RUNS": str(root),
            "PREFECT_API_URL": self.prefect_url,
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            # this checkout also where another one is installed
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")])),
        }
        return {**os.environ, **{name: os.environ.get(name) or value for name, value in defaults.items()}, **ours}

    def up(self) -> None:
        """Start what does not run, wait until it answers, register the deployments, start the worker."""
        self.services[0].folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            environment = self.environment()
            *servers, worker = self.services
            names = [service.name for service in servers]
            for service in servers:
                service.check()
            starting = [service.name for service in servers if not service.pid()]
            stores.check(starting)
            if "mlflow" in starting and not self.workspace.mlflow_database.exists():
                from tasks.registry import make_database  # takes seconds to import

                make_database(environment["MLFLOW_BACKEND_STORE_URI"])
            for service in servers:
                service.start(stores.environment_of(service.name, names, environment))
            for service in servers:
                service.wait()
            environment = stores.environment_of(worker.name, names, environment)
            os.environ.update(environment)  # before Prefect, which reads its settings when it is imported
            if not worker.pid():
                worker.stop()  # what a killed one left
                deployments.forget_lost_runs(only_worker="prefect" in names and not stores.on_server("prefect"))
            deployments.register(environment, PROJECT / "prefect.yaml", worker.folder / "deploy.log", START_TIMEOUT_S)
            worker.start(environment)
            worker.wait()

    def down(self) -> list[str]:
        """Stop all of it, the worker first; the names of what ran."""
        folder = self.services[0].folder
        if not folder.is_dir():
            return []
        with self._alone():  # also a server that the environment no longer asks for
            return [name for name in ("worker", "mlflow", "prefect") if Service(name, folder).stop()]

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with FileLock(self.services[0].folder / "lock"):
            yield


def _python(module: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module)


def _port(variable: str, default: int) -> int:
    text = os.environ.get(variable, "") or str(default)
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ValueError(f"{variable} is {text!r}; it must be a port, 1 to 65535")
    return int(text)


def main(arguments: list[str]) -> int:
    """The command line."""
    try:
        local = Local.here()
        if arguments == ["up"]:
            local.up()
        elif arguments == ["down"]:
            print(f"stopped: {', '.join(local.down()) or 'nothing was running'}")
            return 0
        elif arguments != ["status"]:
            raise ValueError(f"{' '.join(arguments)!r} is not known; use up, down or status")
        for service in local.services:
            print(f"{service.name:8} {f'pid {service.pid()}' if service.pid() else 'not running':14} {service.log}")
        states = {service.name: f" (state: {service.state})" for service in local.services}
        print(f"Prefect  {local.prefect_url.removesuffix('/api')}{states.get('prefect', '')}")
        print(f"MLflow   {local.mlflow_url}{states.get('mlflow', '')}")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
