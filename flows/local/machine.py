"""The services of this machine: which ones it needs, on which state, and how they go up and down together."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from flows.local import deployments, stores
from flows.local.service import START_TIMEOUT_S, Service
from slimgpt.files import locked
from tasks.environment import Workspace, is_server, prepare

PROJECT = Path(__file__).parents[2]


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
        if not is_server(mlflow):
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
        deployments.gpu_slots()  # a wrong number is refused before anything starts
        ports = [service.port for service in self.services if service.port]
        if len(set(ports)) < len(ports):
            raise ValueError(f"PREFECT_PORT and MLFLOW_PORT are both {ports[0]}; set one to another port")
        folder = self.services[0].folder
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):
            environment = self.environment()
            *servers, worker = self.services
            names = [service.name for service in servers]
            for service in self.services:
                if not service.pid():
                    service.stop()  # what a killed one left, or one whose record was lost
            for service in servers:
                service.check()
            starting = [service.name for service in servers if not service.pid()]
            stores.check(starting)
            if "mlflow" in starting and not self.workspace.mlflow_database.exists():
                from tasks.registry.client import make_database  # takes seconds to import

                make_database(environment["MLFLOW_BACKEND_STORE_URI"], "mlflow-artifacts:/")  # the server stores them
            for service in servers:
                service.start(stores.environment_of(service.name, names, environment))
            for service in servers:
                service.wait()
            environment = stores.environment_of(worker.name, names, environment)
            os.environ.update(environment)  # before Prefect, which reads its settings when it is imported
            if not worker.pid():
                deployments.forget_lost_runs(only_worker="prefect" in names and not stores.on_server("prefect"))
            deployments.register(environment, PROJECT / "prefect.yaml", worker.folder / "deploy.log", START_TIMEOUT_S)
            worker.start(environment)
            worker.wait()

    def register(self) -> None:
        """Register the deployments, for workers that others start, on a Prefect server that runs already.

        Raises:
            ConnectionError: when it does not answer.
        """
        folder = self.services[0].folder
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.update(self.environment())  # before Prefect, which reads its settings when it is imported
        from flows.prefect_api import check

        check(self.prefect_url)
        deployments.register(dict(os.environ), PROJECT / "prefect.yaml", folder / "deploy.log", START_TIMEOUT_S)

    def down(self) -> list[str]:
        """Stop all of it, the worker first; the names of what ran."""
        folder = self.services[0].folder
        if not folder.is_dir():
            return []
        with locked(folder, wait=True):  # also a server that the environment no longer asks for
            return [name for name in ("worker", "mlflow", "prefect") if Service(name, folder).stop()]


def _python(module: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module)


def _port(variable: str, default: int) -> int:
    text = os.environ.get(variable, "") or str(default)
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ValueError(f"{variable} is {text!r}; it must be a port, 1 to 65535")
    return int(text)
