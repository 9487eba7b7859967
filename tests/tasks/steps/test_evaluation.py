"""The evaluation alone, in a small flow: reused by content, and measured anew where anything differs."""

import dataclasses
import json
from pathlib import Path

import pytest
from prefect import flow

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.config import EvalConfig
from slimgpt.evaluation.harness import EvalResult
from slimgpt.evaluation.harness_tasks import DataUsed
from tasks.environment import Workspace
from tasks.preflight.models import resolve
from tasks.preflight.request import check_request
from tasks.steps.evaluation import EvalRequest, evaluate_model
from tests.tiny_models import write_dense


@flow(persist_result=False)
def once(model: str, root: str, config: EvalConfig, side: str = "dense") -> EvalResult:
    workspace = Workspace(Path(root))
    ready, dense = check_request("tiny-slim", config, workspace), resolve(model, "", workspace)
    wanted = EvalRequest(side, dense.checkpoint, config, ready.data)
    return evaluate_model(wanted, workspace.run("tiny-slim", {}))


@pytest.fixture
def dense(tmp_path):
    return write_dense(tmp_path / "tiny", num_hidden_layers=2)


def test_the_same_is_measured_once_and_what_differs_anew(prefect_server, dense, tmp_path):
    """``seconds`` tells them apart: no two evaluations take the same time to the nanosecond."""
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 200)
    config = EvalConfig(tasks=("continuation",), limit=2, perplexity=str(text), seq_len=64, max_blocks=2)
    runs = str(tmp_path / "runs")
    first = once(str(dense), runs, config)
    assert once(str(dense), runs, config) == first
    assert once(str(dense), runs, config, side="pruned") == first  # nothing of it was pruned away
    kept = [tmp_path.glob(f"runs/tiny-slim/*/evaluation-{side}.json") for side in ("dense", "pruned")]
    assert [json.loads(file.read_text()) for files in kept for file in files] == [first.to_dict()] * 2
    results = [first, once(str(dense), runs, dataclasses.replace(config, limit=3))]
    text.write_text("four five six " * 200)  # the same name, another text
    results.append(once(str(dense), runs, config))
    write_dense(dense, num_hidden_layers=2, seed=1)  # the same name, other weights
    results.append(once(str(dense), runs, config))
    assert len({result.seconds for result in results}) == 4
    perplexities = [result.perplexity.perplexity for result in results]
    assert perplexities[0] == perplexities[1]  # the limit is the tasks'
    assert len(set(perplexities)) == 3


def test_figures_of_data_without_a_digest_are_not_kept(dense):
    of_hub, at_hand = (
        DataUsed(name="piqa", origin=origin, sha256=digest) for origin, digest in (("hub", ""), ("file", "1"))
    )
    request = EvalRequest("dense", Checkpoint.open(dense), EvalConfig(), (at_hand,))
    assert request.facts
    assert dataclasses.replace(request, data=(at_hand, of_hub)).facts is None
