"""System metrics of an entire flow: MLflow's own monitors, kept in memory until there is a run to log them to.

MLflow's sampler needs a run from the start, and a run that is made first is left half-filled by whatever stops the
flow. Here a run is made when everything is there.
"""

import contextlib
import threading
import time
import weakref

from mlflow.entities import Metric
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

MOST = 2000  # samples; then every second one goes and the rest come half as often


class MachineWatch:
    """Looks at the machine every ``seconds`` (0: never) from a thread that ends with this object."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.samples: list[list[Metric]] = []
        self._stop = threading.Event()
        if seconds > 0:
            self._monitors = _monitors()
            weakref.finalize(self, self._stop.set)  # a flow that fails drops it
            threading.Thread(target=_watch, args=(weakref.ref(self), self._stop), daemon=True).start()

    def look(self) -> None:
        """Take one sample."""
        now, figures = int(time.time() * 1000), []
        for monitor in self._monitors:
            monitor.collect_metrics()
            figures += [(f"system/{name}", float(value)) for name, value in monitor.aggregate_metrics().items()]
            monitor.clear_metrics()
        self.samples.append([Metric(name, value, now, 0) for name, value in figures])
        if len(self.samples) >= MOST:
            self.samples, self.seconds = self.samples[::2], self.seconds * 2

    def stop(self) -> list[Metric]:
        """End, and return all metrics, numbered by sample."""
        self._stop.set()
        return [
            Metric(metric.key, metric.value, metric.timestamp, step)
            for step, sample in enumerate(self.samples)
            for metric in sample
        ]


def _monitors() -> list[BaseMetricsMonitor]:
    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(Exception):  # without NVIDIA's library or a GPU it raises whatever it likes
        monitors.append(GPUMonitor())
    return monitors


def _watch(watch: "weakref.ref[MachineWatch]", stop: threading.Event) -> None:
    while (alive := watch()) is not None and not stop.is_set():
        alive.look()
        seconds = alive.seconds
        del alive
        stop.wait(seconds)
