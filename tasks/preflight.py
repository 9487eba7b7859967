"""All that can be refused before any long work: names, servers, texts, disk; and what will be skipped."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from deploy.availability import vllm_available
from slimgpt.config import EvalConfig, PruneConfig
from slimgpt.harness_tasks import DataUsed, choose_tasks, load_tasks
from slimgpt.plan import PrunePlan, plan
from slimgpt.text import perplexity_text
from tasks.environment import RunFolder, Workspace
from tasks.registry import artifact_folder, check_name, open_client
from tasks.registry_config import RegistryConfig

SMALL_FILES = 32 << 20  # reports, plots, logs, the databases' growth


@dataclass(frozen=True)
class Preflight:
    """What is known before the work starts.

    Attributes:
        serving: empty where vLLM can serve here, else one line: why not, and what would make it work.
        data: that the evaluation uses.
    """

    serving: str
    data: tuple[DataUsed, ...] = ()


@task(name="check the request", cache_policy=NO_CACHE, persist_result=False)
def check_request(name: str, evaluation: EvalConfig, workspace: Workspace) -> Preflight:
    """Refuse what cannot work: names, data, folders, a registry that does not answer.

    Raises:
        ValueError, OSError: one line with the remedy.
    """
    check_name(name)
    check_writable(workspace.root)
    data: tuple[DataUsed, ...] = ()
    with tempfile.TemporaryDirectory(prefix="slimgpt-check-", ignore_cleanup_errors=True) as scratch:
        if names := choose_tasks(evaluation.tasks):
            data += load_tasks(names, Path(scratch))[1]  # what is wrong would else be found after the pruning
    if evaluation.perplexity != "none":
        text = perplexity_text(evaluation.perplexity)
        data += (DataUsed(name=text.name, origin=text.origin, sha256=text.sha256),)
    open_client(workspace)
    reason = vllm_available()
    if reason:
        get_run_logger().warning("serving steps will be skipped: %s", reason)
    return Preflight(reason, data)


def check_writable(folder: Path) -> None:
    """Make ``folder`` and try to write to it.

    Raises:
        OSError: naming the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}); choose another folder") from None


@task(name="plan the pruning", cache_policy=NO_CACHE, persist_result=False)
def plan_pruning(model: Path, config: PruneConfig) -> PrunePlan:
    """Widths, memory and the calibration's tokens before any weight is read; what is missing stops the flow here.

    Raises:
        ValueError: one line that names all that is missing.
    """
    planned = plan(model, config)
    if planned.missing:
        raise ValueError("; ".join(planned.missing))
    get_run_logger().info(
        "%.1f M parameters become %.1f M; calibration: %s; about %.1f GB of memory",
        planned.parameters_before / 1e6,
        planned.parameters_after / 1e6,
        planned.calibration.get("name"),
        planned.memory_bytes / 1e9,
    )
    return planned


@task(name="check the disk", cache_policy=NO_CACHE, persist_result=False)
def check_disk(wanted: list[tuple[PrunePlan, RunFolder]], config: RegistryConfig, workspace: Workspace) -> None:
    """Refuse what the disks cannot hold: the pruned models, a bundle and MLflow's copy of one, less what is there.

    Args:
        wanted: every model that will be made, and where; one of them is packaged and registered.
        config: whether MLflow gets a copy.
        workspace: of all of them.

    Raises:
        OSError: one line with the folder, what it lacks room for, and the remedy.
    """
    models = "the pruned model" if len(wanted) == 1 else f"{len(wanted)} pruned models"
    needs = {workspace.root: {models: sum(_missing(planned, folder) for planned, folder in wanted)}}
    largest = max(planned.bytes_after for planned, _ in wanted)
    if not _links(workspace.root):
        needs[workspace.root]["the bundle"] = largest
    store = artifact_folder(open_client(workspace), config.experiment, workspace)
    if store is not None and config.weights == "copy":
        store.mkdir(parents=True, exist_ok=True)
        same = store.stat().st_dev == workspace.root.stat().st_dev
        needs.setdefault(workspace.root if same else store, {})["MLflow's copy"] = largest
    for place, parts in needs.items():
        free, need = shutil.disk_usage(place).free, sum(parts.values()) + SMALL_FILES
        if free < need:
            told = ", ".join(f"{size / 1e9:.2f} GB {part}" for part, size in parts.items())
            raise OSError(
                f"the disk of {place} has {free / 1e9:.2f} GB free; this run needs {need / 1e9:.2f} GB more there "
                f"({told}); free some, or choose another folder for the runs"
            )


def _missing(planned: PrunePlan, folder: RunFolder) -> int:
    """Bytes that are still to be written of this model."""
    if (folder.model / "config.json").is_file():  # written last
        return 0
    return max(0, planned.disk_bytes - sum(file.stat().st_size for file in folder.model.glob("*.safetensors")))


def _links(folder: Path) -> bool:
    """Whether files in ``folder`` can have a second name, so that a bundle is no second copy."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".links-") as scratch:
        first = Path(scratch) / "first"
        first.touch()
        try:
            os.link(first, Path(scratch) / "second")
        except OSError:
            return False
    return True
