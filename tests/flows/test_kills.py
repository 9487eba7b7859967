"""``slimgpt compress`` killed at random moments of every phase: nothing half looks complete, the next run goes on."""

import json
import os
import pydoc_data.topics
import random
import signal
import time
from urllib.request import Request, urlopen

import psutil
import pytest
from mlflow.entities import LoggedModelStatus
from prefect.settings import PREFECT_API_URL

from deploy.bundle.folder import verify_bundle
from deploy.engines.availability import vllm_obstacle
from deploy.serving.server import ServeConfig, serving
from slimgpt.files import folder_sha256
from tasks.digests import folder_digest
from tasks.environment import Workspace
from tasks.registry.client import open_client
from tasks.registry.fetching import fetch_model
from tests import processes
from tests.flows import killed_flow
from tests.tiny_models import write_dense

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.minutes]
SEED = 20261125
NAME = "tiny-slim"
SMALL = (
    "--num-samples 4 --seq-len 64 --ffn-multiple 16 --evaluation.tasks none --evaluation.seq-len 64 "
    "--evaluation.max-blocks 2 --bench.num-prompts 4 --bench.input-len 16 --bench.output-len 32 --bench.pairs 1 "
    "--bench.load-shares 0.5 --bench.num-warmups 1 --bench.enforce-eager --bench.kvcache-gib 1 "
    "--bench.dtype float32 --no-bench.show-drift"
)
# The registry is where half a result could pass for a complete one, so most moments lie there.
WRITING = ("database", "prune", "evaluate", "package", "run", "upload", "version", "finish", "alias")
MORE = ("database", "database", "find", "plan", "open", "prune", "report", "upload", "show")


class Flows:
    """Runs of one command, each in a process of its own, and what they leave."""

    def __init__(self, place, api):
        # head_dim 32 is the smallest that vLLM's CPU kernels take
        sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        self.dense = write_dense(place / "tiny", num_hidden_layers=3, intermediate_size=256, **sizes)
        self.text = place / "topics.txt"
        self.text.write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:20]))
        self.api, self.log, self.answer = api, place / "log", processes.queue()

    def start(self, runs, kill_in="", at_call=0, *, vllm=False):
        text = ["--calibration", str(self.text), "--evaluation.perplexity", str(self.text)]
        words = ["--model", str(self.dense), "--runs", str(runs), *text, *SMALL.split()]
        return processes.start(killed_flow.compress, words, self.api, self.log, vllm, kill_in, at_call, self.answer)

    def finish(self, runs):
        """An uninterrupted run: the calls of each phase."""
        process = self.start(runs)
        process.join()
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        return self.answer.get(timeout=10)


@pytest.fixture(scope="module")
def flows(tmp_path_factory, prefect_server):
    return Flows(tmp_path_factory.mktemp("kills"), PREFECT_API_URL.value())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, flows):
    """An uninterrupted run in a workspace of its own, and how many calls each phase took."""
    workspace = Workspace.at(tmp_path_factory.mktemp("uninterrupted"))
    return workspace, flows.finish(workspace.root)


def left_behind(pid):
    """Live processes that the flow with this pid started, by its session or by the variable it gave them."""
    found = []
    for process in psutil.process_iter():
        try:
            marked = process.environ().get("SLIMGPT_TEST_FLOW") == str(pid)
            if (marked or os.getsid(process.pid) == pid) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    return found


def assert_nothing_is_left_behind(pid):
    deadline = time.monotonic() + 20
    while (left := left_behind(pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def registered(workspace):
    """The version that has the alias, and the newest one. What passes for complete in the registry is complete."""
    client = open_client(workspace)
    versions = client.search_model_versions(f"name='{NAME}'")
    for version in versions:
        folder = fetch_model(f"models:/{NAME}/{version.version}", workspace)
        assert folder_sha256(folder) == version.tags["sha256"]
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for model in client.search_logged_models(experiments):
        if model.status == LoggedModelStatus.READY:
            assert folder_sha256(fetch_model(f"models:/{model.model_id}", workspace)) == model.tags["sha256"]
    numbers = {int(version.version) for version in versions}
    for run in client.search_runs(experiments, "attributes.status = 'FINISHED'"):
        parent = run.data.tags.get("mlflow.parentRunId", run.info.run_id)
        assert parent in {version.run_id for version in versions}
    aliases = client.get_registered_model(NAME).aliases if numbers else {}
    assert set(aliases) <= {"challenger"} and set(map(int, aliases.values())) <= numbers
    return int(aliases.get("challenger", 0)), max(numbers, default=0)


def statuses(workspace):
    client = open_client(workspace)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.status for run in client.search_runs(experiments)}


def run_folder(workspace):
    (folder,) = (workspace.root / NAME).iterdir()
    return folder


@pytest.mark.parametrize(
    "phases", [pytest.param(WRITING, id="writing"), pytest.param(MORE, id="more", marks=pytest.mark.all)]
)
def test_killed_at_random_moments_nothing_half_looks_complete_and_the_next_run_goes_on(
    flows, uninterrupted, tmp_path, phases
):
    workspace, calls = uninterrupted
    chance, there = random.Random(SEED), Workspace.at(tmp_path / "runs")
    before = 0
    for phase in phases:
        at_call = chance.randint(1, int(0.9 * calls[phase]))
        process = flows.start(there.root, phase, at_call)
        process.join()
        moment = f"seed {SEED}: killed at call {at_call} of {phase}"
        assert process.exitcode == -signal.SIGKILL, f"{moment}; {flows.log.read_text()[-3000:]}"
        assert_nothing_is_left_behind(process.pid)
        now, newest = registered(there)
        assert now in (before, newest), moment
        for bundle in there.root.glob(f"{NAME}/*/bundle"):
            assert verify_bundle(bundle) == [], moment
        before = now
    flows.finish(there.root)
    now, newest = registered(there)
    assert now == newest > before
    assert statuses(there) == {"FINISHED", "KILLED"}  # each was marked by the one after it
    assert folder_digest(run_folder(there) / "model") == folder_digest(run_folder(workspace) / "model")


@pytest.mark.skipif(bool(vllm_obstacle()), reason=f"vLLM cannot run here: {vllm_obstacle()}")
def test_killed_while_it_measures_no_server_is_left_and_what_was_registered_before_serves(
    flows, uninterrupted, tmp_path
):
    """A kill while the first server starts, and one while both are up and a client loads them."""
    workspace, _ = uninterrupted
    before, chance = registered(workspace), random.Random(SEED)
    for line in ("starting vLLM with the dense model", "pruned model ready"):
        process = flows.start(workspace.root, vllm=True)
        try:
            while line not in flows.log.read_text():
                assert process.is_alive(), flows.log.read_text()[-3000:]
                time.sleep(0.05)
            while not (children := left_behind(process.pid)[1:]):
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 3))
        finally:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert any("deploy.engines.vllm_entry" in words for words in children)
        assert_nothing_is_left_behind(process.pid)
        assert registered(workspace) == before
    folder = fetch_model(f"models:/{NAME}@challenger", workspace)
    config = ServeConfig(enforce_eager=True, kvcache_gib=1, dtype="float32")
    with serving(folder, config, log=tmp_path / "vllm.log", served_name=NAME) as server:
        payload = {"model": NAME, "prompt": "The if statement", "max_tokens": 4, "temperature": 0}
        request = Request(f"{server.url}/v1/completions", json.dumps(payload).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
