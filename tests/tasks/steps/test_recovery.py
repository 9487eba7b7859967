"""Pruning and recovery in turns, in a small flow: reused by content, the teacher is the first model of all."""

from pathlib import Path

import pytest
from prefect import flow

from slimgpt.checkpoints.lineage import Checkpoint
from slimgpt.config import PruneConfig, RecoverConfig
from tasks.environment import Workspace
from tasks.preflight.chain import plan_chain
from tasks.preflight.models import resolve
from tasks.steps.chain import run_chain
from tasks.steps.recovery import stages_of
from tests.tiny_families import write_baichuan, write_multimodal_gemma3
from tests.tiny_models import write_dense

PRUNE = PruneConfig(ratio=0.4, num_samples=4, seq_len=64, calibration="python", ffn_multiple=4)
RECOVER = RecoverConfig(tokens="1024", seq_len=32, text="python", held_out=2, learning_rate=0.002, dtype="float32")


@flow(persist_result=False)
def in_turns(model: str, root: str, recover: RecoverConfig, rounds: int) -> Checkpoint:
    workspace = Workspace(Path(root))
    dense = resolve(model, "", workspace)
    chain = plan_chain(dense, stages_of(PRUNE, recover, rounds=rounds))
    return run_chain(chain, workspace.run("tiny-slim", chain.facts()))


@pytest.fixture
def dense(tmp_path):
    return write_dense(tmp_path / "tiny", num_hidden_layers=2)


def test_each_pruning_is_followed_by_a_training_and_the_same_request_is_made_once(prefect_server, dense, tmp_path):
    made = in_turns(str(dense), str(tmp_path / "runs"), RECOVER, 2)
    steps = made.lineage.steps
    assert made.lineage.names == "prune, recover, prune, recover"
    assert [step.config["teacher"] for step in steps[1::2]] == ["tiny", "tiny"]
    assert [step.config["ratio"] for step in steps[::2]] == pytest.approx([0.2, 0.25], abs=0.01)  # 0.25 of what is left
    assert made.lineage.ratio == pytest.approx(0.4, abs=0.02)
    assert not list(made.folder.parent.glob("stages/*"))
    when = (made.folder / "lineage.json").stat().st_mtime_ns
    again = in_turns(str(dense), str(tmp_path / "runs"), RECOVER, 2)
    assert (again.folder, (again.folder / "lineage.json").stat().st_mtime_ns) == (made.folder, when)


@pytest.mark.parametrize("name", ["tokenizer.json", "recovery.json"])
def test_a_trained_model_with_a_damaged_file_is_trained_again(prefect_server, dense, tmp_path, name):
    """Its training's states are gone: the folder that stands in the way is removed."""
    made = in_turns(str(dense), str(tmp_path / "runs"), RECOVER, 1)
    (made.folder / name).write_text("{")
    again = in_turns(str(dense), str(tmp_path / "runs"), RECOVER, 1)
    assert (again.folder, again.digest) == (made.folder, made.digest)
    assert (again.folder / name).stat().st_size > 1


@pytest.mark.parametrize("write", [write_baichuan, write_multimodal_gemma3])
def test_a_model_under_other_names_learns_from_itself_once_it_is_pruned(prefect_server, write, tmp_path):
    stored, _ = write(tmp_path)
    made = in_turns(str(stored), str(tmp_path / "runs"), RECOVER, 1)
    step = made.lineage.steps[-1]
    assert (step.step, step.config["teacher"]) == ("recover", stored.name)
    assert step.figures["kl_before"] > 0


def test_what_a_training_lacks_is_said_before_the_pruning(prefect_server, dense, tmp_path):
    with pytest.raises(ValueError, match=r"stage 2 of 2: seq_len is 4096; .* reads at most 512"):
        in_turns(str(dense), str(tmp_path / "runs"), RecoverConfig(tokens="8192", seq_len=4096, text="python"), 1)
    assert not list(tmp_path.glob("runs/**/*.safetensors"))


@pytest.mark.parametrize(
    ("prune", "given", "message"),
    [
        ({}, {"rounds": 0}, "rounds is 0; it must be at least 1"),
        ({}, {"rounds": 2, "first_ratios": (0.1,)}, "rounds is 2 and first_ratios has 1; leave one out"),
        ({"ratio": 0.25, "target_size": "200MB"}, {"rounds": 2}, "rounds is 2 and target_size is given; rounds lead"),
    ],
)
def test_rounds_that_cannot_be_are_refused(prune, given, message):
    with pytest.raises(ValueError, match=message):
        stages_of(PruneConfig(**prune), RECOVER, **given)


def test_without_tokens_nothing_is_trained():
    assert len(stages_of(PRUNE, RecoverConfig(tokens=""), rounds=3)) == 3
