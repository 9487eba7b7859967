"""An MLflow run that is open while a flow works: RUNNING from its first stage on, with its figures as they come.

It ends as FINISHED, FAILED or KILLED. A process that was killed cannot say so: the next run of the same name marks its
run as KILLED, where the process that wrote it is known to have ended.
"""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric, Run
from mlflow.exceptions import MlflowException
from requests import RequestException

from deploy.bench.results import BenchReport
from slimgpt.checkpoints.lineage import Lineage
from slimgpt.evaluation.harness import EvalResult
from slimgpt.report import LayerReport
from tasks.environment import RunFolder, Workspace
from tasks.messages import reason
from tasks.registry.client import explained, impatient, open_client
from tasks.registry.config import RegistryConfig
from tasks.registry.experiments import experiment
from tasks.registry.run_content import (
    bench_metrics,
    evaluation_metrics,
    flat,
    layer_metrics,
    log,
    missing,
    pruning_metrics,
    source_tags,
    training_metrics,
)
from tasks.registry.run_owner import has_ended, this_machine, this_process

PARENT = "mlflow.parentRunId"
PROCESS = "process"  # tag: machine, pid and start time of the process that writes the run
FOLDER = "folder"  # tag: of the run's files; a second compression of the same goes on there
FOLLOWS = "follows"  # tag: the run that was cut short in the same folder
FAILURE = "failure"  # tag: why a run is FAILED or KILLED

_PAUSE_S = 60.0  # of a server that failed nothing is asked for so long: each try may take 10 s
_STOP_WITHIN_S = 15.0
_OPEN: set[str] = set()  # ids of the runs that this process has open
_OPENING = threading.Lock()


@dataclass(eq=False)
class LiveRun:
    """A run that is being written. It may be handed to another process.

    Args:
        workspace: of the registry.
        run_id: MLflow's.
        sampling_interval: seconds between two samples of the machine; 0: none.
        machine: that the flow runs on.
    """

    workspace: Workspace
    run_id: str
    sampling_interval: float
    machine: str = field(default_factory=this_machine)
    _warned: bool = False
    _silent_until: float = 0.0
    _finished: bool = False

    @property
    def client(self) -> MlflowClient:
        """A client of the run's registry."""
        uri = self.workspace.tracking_uri
        return MlflowClient(tracking_uri=uri, registry_uri=uri)

    def log_layer(self, layer: LayerReport, prefix: str = "") -> None:
        """A layer's figures, with the layer as step."""
        self._try(lambda: log(self.client, self.run_id, {}, layer_metrics(layer, prefix)))

    def log_training(self, step: int, measured: dict[str, float], prefix: str = "") -> None:
        """What a training says of a step."""
        self._try(lambda: log(self.client, self.run_id, {}, training_metrics(step, measured, prefix)))

    def log_pruning(self, steps: Lineage, lineage: Lineage) -> None:
        """The totals of the run's own steps, and the figures of those layers that are not logged yet."""
        self._log_missing(pruning_metrics(steps, lineage))

    def log_evaluation(self, side: str, result: EvalResult) -> None:
        """What was measured of the dense or the pruned model."""
        self._log_missing(evaluation_metrics(side, result.metrics))

    def log_benchmark(self, report: BenchReport) -> None:
        """Throughput, latency and the rest."""
        self._log_missing(bench_metrics(report))

    def child(self, title: str, parameters: dict[str, Any], flow: str) -> "LiveRun":
        """A run below this one, whose work has not begun: its status is SCHEDULED."""
        client = self.client
        with explained(f"the run {title} was opened", "nothing is begun", self.workspace):
            place = client.get_run(self.run_id).info.experiment_id
            run_id = create_run(client, place, title, parameters, {**source_tags(flow), PARENT: self.run_id})
            client.update_run(run_id, status="SCHEDULED")
        return LiveRun(self.workspace, run_id, self.sampling_interval, self.machine)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """RUNNING while the block runs, with system metrics; what fails in it ends the run."""
        self._try(lambda: self.client.update_run(self.run_id, status="RUNNING"))
        try:
            with self._sampled():
                yield
        except BaseException as error:
            self.fail(error)
            raise

    def finish(self) -> None:
        """FINISHED, with the runs below it; done once.

        Raises:
            MlflowException, RequestException: when the server refuses, or does not answer.
        """
        if not self._finished:
            _end(self.client, self.client.get_run(self.run_id), "FINISHED")
            self._finished = True

    def fail(self, error: BaseException) -> None:
        """FAILED, or KILLED where the work was interrupted, with the reason and the runs below it.

        If the server does not answer, the run stays RUNNING until the next run of its name looks after it.
        """
        if not self._writable_here:
            return
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        with impatient(), contextlib.suppress(MlflowException, RequestException, OSError):
            _end(self.client, self.client.get_run(self.run_id), status, _failure(error))

    def _log_missing(self, metrics: list[Metric]) -> None:
        self._try(lambda: log(self.client, self.run_id, {}, missing(self.client, self.run_id, metrics)))

    @property
    def _writable_here(self) -> bool:
        """False on a worker of another machine where the registry is an SQLite file: one machine alone may write it."""
        return not self.workspace.tracking_uri.startswith("sqlite:") or self.machine == this_machine()

    def _try(self, call: Callable[[], object]) -> None:
        """Write now if MLflow answers. Hours of work must not fail over a figure that is logged again at the end."""
        if not self._writable_here or time.monotonic() < self._silent_until:
            return
        try:
            with impatient():
                call()
        except (MlflowException, RequestException, OSError) as error:
            self._silent_until = time.monotonic() + _PAUSE_S
            if not self._warned:
                logging.getLogger(__name__).warning(
                    "MLflow failed (%s): the work goes on, and what is not logged now is logged at its end",
                    reason(error, self.workspace.tracking_uri),
                )
            self._warned = True

    @contextlib.contextmanager
    def _sampled(self) -> Iterator[None]:
        """MLflow's own system metrics while the block runs, as ``start_run(log_system_metrics=True)`` logs them."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if not self.sampling_interval or not self._writable_here:
            yield
            return
        logging.getLogger(SystemMetricsMonitor.__module__).setLevel(logging.WARNING)  # that it starts is no news
        with impatient():  # it asks for the last step
            monitor = SystemMetricsMonitor(
                self.run_id,
                sampling_interval=self.sampling_interval,
                resume_logging=True,
                tracking_uri=self.workspace.tracking_uri,
            )
        monitor.start()
        try:
            yield
        finally:
            # It asks the server once more, for minutes where none answers.
            with impatient():
                stop = threading.Thread(target=monitor.finish, daemon=True)
                stop.start()
                stop.join(_STOP_WITHIN_S)


@contextlib.contextmanager
def open_run(
    name: str,
    parameters: dict[str, Any],
    config: RegistryConfig,
    workspace: Workspace,
    folder: RunFolder,
    flow: str = "flows.compress",
) -> Iterator[LiveRun]:
    """A run that shows its parameters at once, and ends with the block: FINISHED, FAILED or KILLED.

    Args:
        name: of the run, where ``config`` names none.
        parameters: nested; flattened to ``prune.ratio`` and the like.
        config: where the run goes.
        workspace: of the registry.
        folder: the run's files.
        flow: that writes it.

    Raises:
        ConnectionError: when MLflow does not answer; nothing is begun.
        OSError: when the disk of its database is full.
    """
    client, title = open_client(workspace), config.run_name or name
    with _OPENING, explained(f"the run {title} was opened", "nothing is begun", workspace):
        place = experiment(client, config.experiment, workspace)
        mark_killed(client, place, title)
        where = f"{folder.root.parent.name}/{folder.root.name}"
        tags = {**source_tags(flow), PROCESS: this_process(), FOLDER: where}
        if cut_short := _cut_short(client, place, where):
            tags[FOLLOWS] = cut_short
        run = LiveRun(workspace, create_run(client, place, title, parameters, tags), config.machine_seconds)
        _OPEN.add(run.run_id)
    try:
        with run.working():
            yield run
        with explained(f"the run {title} was finished", "everything is in it", workspace):
            run.finish()
    finally:
        _OPEN.discard(run.run_id)


def create_run(client: MlflowClient, place: str, title: str, parameters: dict[str, Any], tags: dict[str, str]) -> str:
    """A new run of an experiment with its parameters. Returns its id."""
    run_id = str(client.create_run(place, run_name=title, tags=tags).info.run_id)
    log(client, run_id, flat(parameters), [])
    return run_id


def mark_killed(client: MlflowClient, place: str, title: str) -> None:
    """Set the runs of this title whose process was killed to KILLED, with the runs below them.

    A run of another machine is left alone, and so is one that names no process: whether it lives is not known here.
    """
    for run in client.search_runs([place], "attributes.status = 'RUNNING'", max_results=1000):
        process = run.data.tags.get(PROCESS)
        if run.info.run_name != title or not process:
            continue
        dropped = process == this_process() and run.info.run_id not in _OPEN  # a flow before this one in this process
        if dropped or has_ended(process):
            _end(client, run, "KILLED", "its process ended before it did")


def _cut_short(client: MlflowClient, place: str, folder: str) -> str:
    """The id of the newest run in the same folder, where it ended before its work did; else empty."""
    runs = client.search_runs(
        [place], f"tags.{FOLDER} = '{folder}'", order_by=["attributes.start_time DESC"], max_results=1
    )
    return runs[0].info.run_id if runs and runs[0].info.status in ("FAILED", "KILLED") else ""


def _end(client: MlflowClient, run: Run, status: str, failure: str = "") -> None:
    """Set the status of a run, after those of the runs below it that have not ended."""
    below = client.search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{run.info.run_id}'", max_results=1000)
    for child in below:
        if child.info.status in ("RUNNING", "SCHEDULED"):
            _end(client, child, status, failure)
    if failure:
        client.set_tag(run.info.run_id, FAILURE, failure)
        for output in run.outputs.model_outputs if run.outputs else []:
            if client.get_logged_model(output.model_id).status == LoggedModelStatus.PENDING:
                client.finalize_logged_model(output.model_id, LoggedModelStatus.FAILED)
    client.set_terminated(run.info.run_id, status)


def _failure(error: BaseException) -> str:
    """The error in one line, without passwords and, as in parameters, without the folders of this machine."""
    text = re.sub(r"//[^/\s@]+@", "//", (str(error).splitlines() or [""])[0]).replace("sqlite:///", "")
    text = re.sub(r"(?<![\w:/.])/\S+", lambda path: Path(path[0]).name, text)
    return f"{type(error).__name__}: {text}".removesuffix(": ")[:1000]
