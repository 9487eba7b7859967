"""Make the bundle that serves anywhere, and check it before anything is uploaded."""

from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from deploy.bundle.folder import MANIFEST, verify_bundle, write_bundle
from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.evaluation.harness import EvalResult
from slimgpt.files import file_sha256
from tasks.environment import RunFolder
from tasks.registry.config import RegistryConfig


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder; the checkpoint is in ``model``."""

    folder: Path

    @property
    def model(self) -> Path:
        """The checkpoint in the bundle."""
        return self.folder / "model"


@task(name="package", cache_policy=NO_CACHE, persist_result=False)
def package(
    pruned: Checkpoint,
    dense: EvalResult | None,
    after: EvalResult | None,
    name: str,
    folder: RunFolder,
    config: RegistryConfig,
) -> Bundle:
    """Write the bundle, its card with the figures of both models where they are known, and verify every checksum.

    Where the registry will refer to it, it is one that no later run changes: in a folder named by its content. Its
    weights are hard links, where the file system has such.

    Raises:
        OSError: when a file is not as the manifest says.
    """
    evaluations = {"dense": dense.to_dict(), "pruned": after.to_dict()} if dense and after else {}

    def write(out: Path) -> Bundle:
        bundle = write_bundle(pruned.folder, out, name=name, evaluations=evaluations)
        if problems := verify_bundle(bundle):
            raise OSError(f"the bundle {bundle} is incomplete: {'; '.join(problems)}")
        return Bundle(bundle)

    newest = write(folder.bundle)
    if config.weights == "copy":
        return newest
    referred = folder.referred(file_sha256(newest.folder / MANIFEST))
    return write(referred) if verify_bundle(referred) else Bundle(referred)
