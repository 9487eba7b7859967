"""What docs/deploy.md tells people to type: commands and options that exist, files and names that a bundle has."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow.cli import cli as mlflow

from deploy.bundle.folder import write_bundle
from deploy.engines.availability import vllm_obstacle
from deploy.serving.server import API_KEY, ServeConfig
from flows.cli.app import app
from flows.cli.flags import config_from, given
from tests.deploy.slim_checkpoint import write_slim

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/deploy.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
# Each line's words, without settings of the environment before the command.
LINES = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
LINES = [words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :] for words in LINES]


def commands(*first: str) -> list[list[str]]:
    return [words for words in LINES if tuple(words[: len(first)]) == first]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    model = write_slim(tmp_path_factory.mktemp("docs") / "tiny")
    return write_bundle(model, model.with_name("bundle"), name="tiny")


@pytest.mark.parametrize("words", commands("slimgpt", "serve"), ids=" ".join)
def test_what_follows_serve_makes_a_config(words):
    """That the words are understood is tested for all documents; here, that their values are allowed, also after --."""
    _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
    chosen = bound.arguments
    options = given(chosen["options"]) if "options" in chosen else {}
    assert config_from(ServeConfig(), {**options, "extra": chosen.get("more", ())}).extra == chosen.get("more", ())


@pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")
def test_vllms_options_are_vllms():
    named = {word for words in commands("slimgpt", "serve") if "--" in words for word in words[words.index("--") :]}
    named = {word for word in named if re.match(r"--\w", word)} | {"--tensor-parallel-size", "--trust-remote-code"}
    assert len(named) > 3
    command = [sys.executable, "-P", "-m", "deploy.engines.vllm_entry", "serve", "--help=all"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert named <= set(re.findall(r"--[a-z][a-z-]+", shown.stdout)), shown.stderr[-2000:]


def test_the_mlflow_command_has_these_options():
    (words,) = commands("mlflow")
    known = {name for parameter in mlflow.commands[words[1]].params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_every_file_of_a_bundle_that_it_names_is_there(bundle):
    named = set(re.findall(r"\bbundle/([\w.]+)", TEXT)) | set(re.findall(r"`(\w+\.cpu[\w.]*)`", TEXT)) | {"serve.sh"}
    named -= {".env"}
    assert {"compose.yaml", "kubernetes.yaml", "Containerfile.cpu", "model"} <= named
    assert [name for name in named if not (bundle / name).exists()] == []


def test_names_in_the_cluster_are_those_of_the_manifests(bundle):
    deployment, service = yaml.safe_load_all((bundle / "kubernetes.yaml").read_text())
    kubectl = " ".join(" ".join(words) for words in LINES if "kubectl" in words)
    assert f"deployment/{deployment['metadata']['name']} " in kubectl
    assert f"service/{service['metadata']['name']} 8000:{service['spec']['ports'][0]['port']}" in kubectl
    key = deployment["spec"]["template"]["spec"]["containers"][0]["env"][0]
    reference = key["valueFrom"]["secretKeyRef"]
    assert f"create secret generic {reference['name']} --from-file={reference['key']}=" in kubectl
    assert set(re.findall(r"\b\w+_API_KEY", TEXT)) == {API_KEY} == {key["name"]}


def test_the_settings_that_it_quotes_are_those_of_the_files(bundle):
    containerfile = (bundle / "Containerfile").read_text()
    assert re.search(r"runs as user (\d+)", TEXT)[1] in containerfile
    for image in re.findall(r"`(vllm/[\w-]+)`", TEXT):
        assert any(f"FROM {image}:" in (bundle / f"Containerfile{suffix}").read_text() for suffix in ("", ".cpu"))
    assert (
        "${PORT:-8000}" in (bundle / "compose.yaml").read_text() and "`PORT` is the port on this machine (8000)" in TEXT
    )
    assert (
        "count: 1" in (bundle / "compose.yaml").read_text()
        and "nvidia.com/gpu: 1" in (bundle / "kubernetes.yaml").read_text()
    )
