"""The one line that says why a step that serves was skipped."""

import platform
import sys
from pathlib import Path

import pytest

from deploy import availability


def test_this_machine_serves():
    """Linux with vLLM from the lock: everything that serves runs here."""
    if not availability.vllm_version():
        pytest.skip("vLLM is not installed on this machine")
    assert availability.vllm_available() == ""


@pytest.mark.parametrize(
    ("system", "word"), [("linux", "Linux"), ("darwin", "no vLLM wheel"), ("win32", "no vLLM wheel")]
)
def test_without_vllm_one_line_says_why_and_what_would_work(monkeypatch, system, word):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(availability, "vllm_version", lambda: "")
    reason = availability.vllm_available()
    assert word in reason and "serving needs" in reason and "\n" not in reason


def test_an_old_cpu_is_named(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu sse2 avx\n")
    assert availability._lacking_cpu_feature(cpuinfo) == "AVX2"
    cpuinfo.write_text("flags\t\t: fpu sse2 avx avx2\n")
    assert availability._lacking_cpu_feature(cpuinfo) == ""
