"""The environment every entry point needs, and the folders of a run. Imports nothing that reads settings at import.

``prepare()`` comes before ``import prefect``: Prefect reads its settings then. What the user has set is
never overwritten.
"""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from slimgpt.files import expanded

RUNS_VARIABLE = "SLIMGPT_RUNS"
ARTIFACTS = "mlflow-artifacts"  # in the workspace
_chosen: set[tuple[str, str]] = set()  # what earlier calls of prepare() set, which a later one may change


@dataclass(frozen=True)
class Workspace:
    """Where runs leave their files: one folder, by default ``./runs`` (or ``SLIMGPT_RUNS``)."""

    root: Path

    @classmethod
    def at(cls, folder: str | Path = "") -> "Workspace":
        """The workspace in ``folder``, as an absolute path; the default place where ``folder`` is empty."""
        return cls(expanded(folder or os.environ.get(RUNS_VARIABLE, "") or "runs").absolute())

    @property
    def mlflow_database(self) -> Path:
        """MLflow's SQLite file."""
        return self.root / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        """Where MLflow keeps files when no server does."""
        return self.root / ARTIFACTS

    @property
    def fetched(self) -> Path:
        """Models that were downloaded from a registry, by id."""
        return self.root / "fetched"

    @property
    def tracking_uri(self) -> str:
        """``MLFLOW_TRACKING_URI`` where set, else SQLite in this workspace, as an absolute path."""
        return os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{self.mlflow_database}"

    def run(self, name: str, facts: dict[str, object]) -> "RunFolder":
        """The folder of one compression: the same for the same facts, so that a second run goes on."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return RunFolder(self.root / name / digest[:12])


def is_server(tracking_uri: str) -> bool:
    """Whether MLflow is asked by HTTP, not as a database."""
    return urlsplit(tracking_uri).scheme in ("http", "https")


@dataclass(frozen=True)
class RunFolder:
    """The files of one compression."""

    root: Path

    @property
    def model(self) -> Path:
        """The checkpoint of the last stage, as the engine writes and resumes it."""
        return self.root / "model"

    def stage(self, number: int, name: str) -> Path:
        """The checkpoint of a stage before the last one."""
        return self.root / "stages" / f"{number}-{name}"

    @property
    def bundle(self) -> Path:
        """The newest bundle: what is served, and what is registered as a copy."""
        return self.root / "bundle"

    def referred(self, digest: str) -> Path:
        """A bundle that a version refers to: it stays as it is when ``bundle`` is written again."""
        return self.root / "bundles" / digest[:12]

    @property
    def bench(self) -> Path:
        """bench.json and the logs."""
        return self.root / "bench"

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.root / "report.html"


def prepare(runs: str | Path = "") -> Workspace:
    """Set what Prefect, MLflow, vLLM and Hugging Face read from the environment, and return the workspace.

    Nothing is created, and nothing that the user has set is changed.

    Raises:
        ValueError: where MLflow's database cannot lie in the folder.
    """
    workspace = Workspace.at(runs)
    wanted = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{workspace.mlflow_database}",  # else a relative one: it would follow the cwd
        # results ignore PREFECT_HOME and would land in the user's home folder
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(workspace.root / "prefect-results"),
        "PREFECT_MEMO_STORE_PATH": str(workspace.root / "prefect-results" / "memo.toml"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # 20 is too short on a busy machine's first start
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_LOG_UV_FILES": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # Files of a bucket by the server too: of itself MLflow fetches them there, and only the server may reach it
        "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "slimgpt",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # forked after use it would warn on each start of a child
    }
    if sys.stderr is None or not sys.stderr.isatty():  # a log gets a line per update
        wanted["TQDM_MININTERVAL"] = "10"
    for variable, value in wanted.items():
        now = os.environ.get(variable, "")
        if not now or (variable, now) in _chosen:
            os.environ[variable] = value
            _chosen.add((variable, value))
    if "?" in str(runs) and os.environ["MLFLOW_TRACKING_URI"] == wanted["MLFLOW_TRACKING_URI"]:
        raise ValueError(
            f"runs is {str(runs)!r}; a database's URL ends at ?, so it would lie beside the folder; "
            f"choose a path without ? with --runs or {RUNS_VARIABLE}"
        )
    _take_password_out()
    _own_machine_without_proxy()
    return workspace


def _own_machine_without_proxy() -> None:
    """Ask servers of this machine directly: Prefect's temporary one, vLLM and MLflow answer on 127.0.0.1."""
    if not any(name.lower().endswith("_proxy") and name.lower() != "no_proxy" for name in os.environ):
        return
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in named.split(",") if host.strip()]
    if "*" not in hosts:
        wanted = ",".join([*hosts, *(host for host in ("127.0.0.1", "localhost", "::1") if host not in hosts)])
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = wanted


def _take_password_out() -> None:
    """Give MLflow user and password of its server in the variables for them: the URI gets into messages and logs."""
    parts = urlsplit(os.environ["MLFLOW_TRACKING_URI"])
    if parts.scheme in ("http", "https") and parts.username is not None:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
        os.environ["MLFLOW_TRACKING_URI"] = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
