"""Peak memory of real processes."""

import subprocess
import sys

import pytest

from deploy.bench.footprint import gpu_memory, peak_resident


def test_the_peak_is_known_after_the_memory_was_given_back():
    code = "held = b'x' * 300_000_000; del held; print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as one:
        with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1) as other:
            for process in (one, other):
                process.stdout.readline()
            alone, both = peak_resident([one.pid]), peak_resident([one.pid, other.pid])
            other.communicate(b"\n")
        one.communicate(b"\n")
    if alone is None:
        pytest.skip("this system does not tell peak memory")
    assert 300e6 < alone < 330e6
    assert alone < both < alone + 30e6


def test_processes_that_have_gone_take_nothing():
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    assert peak_resident([int(gone.stdout)]) is None


def test_without_nvidia_smi_gpu_memory_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu_memory([1]) is None


def test_gpu_memory_is_summed_over_our_processes(monkeypatch, tmp_path):
    listed = "10, 2048\n10, 512\n11, 1024\n12, 4096\n"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\ncat <<'END'\n" + listed + "END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert gpu_memory([10, 11]) == (2048 + 512 + 1024) * 2**20
