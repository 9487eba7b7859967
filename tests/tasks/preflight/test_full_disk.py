"""A disk that is too small is refused before the pruning; one that fills later leaves nothing half-written behind."""

import contextlib
import os
import shutil

import pytest
from prefect.logging import disable_run_logger

from deploy.bundle.folder import verify_bundle
from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.files import folder_sha256
from tasks.environment import RunFolder, Workspace
from tasks.preflight.chain import plan_chain
from tasks.preflight.disk import SMALL_FILES, check_disk
from tasks.preflight.models import ResolvedModel
from tasks.registry.client import open_client
from tasks.registry.config import RegistryConfig
from tasks.registry.fetching import fetch_model
from tasks.registry.live_run import open_run
from tasks.steps.bundling import package
from tasks.steps.pruning import prune_stages
from tasks.steps.registration import register
from tests.tasks.registry import finished_run


@pytest.fixture
def disk(small_disk, monkeypatch):
    """A small disk, whose registry is an SQLite file on it."""
    with small_disk("80M") as folder:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/runs/mlflow.db")
        yield folder


@contextlib.contextmanager
def filled(disk, *, kib_left):
    """While the block runs, so much room is left on the disk."""
    with (disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(disk).free - (kib_left << 10))
    try:
        yield
    finally:
        (disk / "filler").unlink()


@pytest.mark.parametrize("kib_left", [0, 8, 24])
def test_while_packaging_it_is_one_line_and_the_bundle_before_stays(disk, kib_left):
    root = finished_run.make(disk, packaged=False)
    folder, request = RunFolder(root), finished_run.request(root, "tiny-slim")
    pruned = Checkpoint.open(folder.model)

    def run():
        return package.fn(pruned, request.dense, request.pruned, "tiny-slim", folder, RegistryConfig())

    for there in (False, True):
        with filled(disk, kib_left=kib_left):
            with pytest.raises(
                OSError, match=r"the bundle could not be written to .*/run: No space .*make room"
            ) as full:
                run()
            assert "\n" not in str(full.value)
            assert folder.bundle.is_dir() == there
            assert not list(root.glob(".bundle*"))
        assert not there or verify_bundle(folder.bundle) == []
        assert verify_bundle(run().folder) == []


@pytest.mark.parametrize("kib_left", [0, 300])
def test_while_registering_it_is_one_line_and_no_version_more(disk, kib_left):
    """Where the database has no room, and where it has and the model has none."""
    workspace, root = Workspace.at(disk / "runs"), finished_run.make(disk)

    def run():
        return finished_run.registered(finished_run.request(root, "tiny-slim"), workspace)

    first = run()
    request = finished_run.request(root, "tiny-slim")
    with (
        pytest.raises(OSError, match=r"the disk of .*/runs became full while tiny-slim .*has not moved: make") as full,
        disable_run_logger(),
        open_run("tiny-slim", request.parameters, request.config, workspace, request.folder) as live,
        filled(disk, kib_left=kib_left),
    ):
        register.fn(request, live)
    assert not isinstance(full.value, ConnectionError)  # which would be tried again
    assert "\n" not in str(full.value)
    client = open_client(workspace)
    assert [version.run_id for version in client.search_model_versions("name='tiny-slim'")] == [first.run_id]
    assert client.get_model_version_by_alias("tiny-slim", "challenger").run_id == first.run_id
    assert client.get_run(live.run_id).info.status == "FAILED"  # there is room again when it ends
    with filled(disk, kib_left=0), pytest.raises(OSError, match="became full while the run tiny-slim .*nothing is beg"):
        finished_run.registered(request, workspace)
    again = run()
    assert again.version == "2"
    assert folder_sha256(fetch_model(again.uri, workspace)) == folder_sha256(root / "bundle" / "model")


def test_what_packaging_and_the_registrys_copy_need_is_known_before_the_pruning(disk, prefect_server):
    workspace, root = Workspace.at(disk / "runs"), finished_run.make(disk)
    dense = ResolvedModel("tiny", Checkpoint.open(root.parent / "tiny"))
    with disable_run_logger():
        planned = plan_chain(dense, prune_stages(finished_run.PRUNE))
    open_client(workspace)  # makes its database
    new, kib = RunFolder(workspace.root / "tiny-slim" / "1"), planned.stages[0].bytes_after >> 10
    for room, config, refused in (
        (1.5, RegistryConfig(), True),
        (2.5, RegistryConfig(), False),
        (1.5, RegistryConfig(weights="reference"), False),
        (0.5, RegistryConfig(weights="reference"), True),
    ):
        words = "GB free; this run needs .* GB the pruned model" + (", .* GB MLflow's copy" if room > 1 else "")
        expected = pytest.raises(OSError, match=words) if refused else contextlib.nullcontext()
        with filled(disk, kib_left=(SMALL_FILES >> 10) + int(room * kib)), expected:
            check_disk.fn([(planned, new)], config, workspace)
    two, reference = (
        [(planned, new), (planned, RunFolder(new.root.with_name("2")))],
        RegistryConfig(weights="reference"),
    )
    with filled(disk, kib_left=(SMALL_FILES >> 10) + int(1.5 * kib)):
        with pytest.raises(OSError, match=r"needs .* \(.* GB 2 pruned models\)"):  # a sweep's
            check_disk.fn(two, reference, workspace)
        check_disk.fn(two[:1], reference, workspace)
    shutil.copytree(root / "model", new.model)  # pruned already: only the copy is missing
    with filled(disk, kib_left=(SMALL_FILES >> 10) + int(1.5 * kib)):
        check_disk.fn([(planned, new)], RegistryConfig(), workspace)
