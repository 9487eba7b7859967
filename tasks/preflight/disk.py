"""Check that the disks hold what the run will write."""

import os
import shutil
import tempfile
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.environment import RunFolder, Workspace
from tasks.preflight.chain import Chain, Keep
from tasks.registry.client import open_client
from tasks.registry.config import RegistryConfig
from tasks.registry.experiments import artifact_folder

SMALL_FILES = 32 << 20  # reports, plots, logs, the databases' growth


@task(name="check the disk", cache_policy=NO_CACHE, persist_result=False)
def check_disk(
    wanted: list[tuple[Chain, RunFolder]], config: RegistryConfig, workspace: Workspace, keep: Keep = "last"
) -> None:
    """Refuse what the disks cannot hold: what every stage makes, a bundle and MLflow's copy, less what is there.

    Args:
        wanted: every model that will be made, and where; one of them is packaged and registered.
        config: whether MLflow gets a copy.
        workspace: of all of them.
        keep: whether what the stages before the last one make stays.

    Raises:
        OSError: one line with the folder, what it lacks room for, and the remedy.
    """
    models = "the pruned model" if len(wanted) == 1 else f"{len(wanted)} pruned models"
    needs = {workspace.root: {models: sum(chain.missing_bytes(folder, keep) for chain, folder in wanted)}}
    largest = max(chain.stages[-1].bytes_after for chain, _ in wanted)
    if not _links(workspace.root):
        needs[workspace.root]["the bundle"] = largest * (2 if config.weights == "reference" else 1)
    store = artifact_folder(open_client(workspace), config.experiment, workspace)
    if store is not None and config.weights == "copy":
        store.mkdir(parents=True, exist_ok=True)
        same = store.stat().st_dev == workspace.root.stat().st_dev
        needs.setdefault(workspace.root if same else store, {})["MLflow's copy"] = largest
    for place, parts in needs.items():
        free, need = shutil.disk_usage(place).free, sum(parts.values()) + SMALL_FILES
        if free < need:
            listed = ", ".join(f"{size / 1e9:.2f} GB {part}" for part, size in parts.items())
            raise OSError(
                f"the disk of {place} has {free / 1e9:.2f} GB free; this run needs {need / 1e9:.2f} GB more there "
                f"({listed}); free some, or choose another folder for the runs"
            )


def _links(folder: Path) -> bool:
    """Whether files in ``folder`` can have a second name, so that a bundle is not a second copy."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".links-") as scratch:
        first = Path(scratch) / "first"
        first.touch()
        try:
            os.link(first, Path(scratch) / "second")
        except OSError:
            return False
    return True
