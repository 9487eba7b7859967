"""System metrics without a run: sampled from a thread that ends with its owner."""

import contextlib
import gc
import threading
import time
from pathlib import Path

from tasks.registry import machine
from tasks.registry.machine import MachineWatch


def test_samples_are_numbered_and_come_from_this_machine():
    watch = MachineWatch(0.01)
    while len(watch.samples) < 3:
        time.sleep(0.01)
    metrics = watch.stop()
    steps = [metric.step for metric in metrics if metric.key == "system/system_memory_usage_megabytes"]
    assert steps == list(range(len(steps)))
    assert len(steps) >= 3
    total = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    ).split()[1]
    memory = [metric.value for metric in metrics if metric.key == "system/system_memory_usage_megabytes"]
    assert all(0 < value < int(total) / 1000 * 1.03 for value in memory)


def test_never_is_never():
    assert MachineWatch(0).stop() == []


def test_the_thread_ends_with_a_flow_that_fails():
    def flow():
        watch = MachineWatch(60)
        threads.append(next(thread for thread in threading.enumerate() if thread.name.endswith("(_watch)")))
        raise RuntimeError(id(watch))

    threads = []
    with contextlib.suppress(RuntimeError):
        flow()
    gc.collect()
    threads[0].join(timeout=30)
    assert not threads[0].is_alive()


def test_long_flows_keep_fewer_samples_from_start_to_end(monkeypatch):
    monkeypatch.setattr(machine, "MOST", 10)
    watch = MachineWatch(0)
    watch._monitors, watch.seconds = machine._monitors(), 1.0
    for _ in range(100):
        watch.look()
    assert len(watch.samples) < 10
    assert watch.seconds > 8  # as often as its samples are apart
