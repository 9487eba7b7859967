"""The prune step alone, in a small flow: reused by content, and only where it is still complete."""

import dataclasses
import os
from pathlib import Path

import pytest
from prefect import flow
from prefect.logging import disable_run_logger

from slimgpt.checkpoints.lineage import Checkpoint, load_lineage
from slimgpt.config import PruneConfig
from slimgpt.report import load_report
from tasks.digests import folder_digest
from tasks.environment import RunFolder, Workspace
from tasks.preflight.chain import Keep, plan_chain
from tasks.preflight.models import ResolvedModel, resolve
from tasks.steps.chain import run_chain
from tasks.steps.pruning import prune_stages
from tests.tiny_models import write_dense

CONFIG = PruneConfig(num_samples=4, seq_len=64, calibration="python", ffn_multiple=4)


@flow(persist_result=False)
def once(
    model: str, root: str, config: PruneConfig, first_ratios: tuple[float, ...] = (), keep: Keep = "last"
) -> tuple[Path, int]:
    workspace = Workspace(Path(root))
    dense: ResolvedModel = resolve(model, "", workspace)
    chain = plan_chain(dense, prune_stages(config, first_ratios))
    folder = run_chain(chain, workspace.run("tiny-slim", chain.facts()), keep).folder
    return folder, (folder / "pruning.json").stat().st_mtime_ns  # when it was made


@pytest.fixture
def dense(tmp_path):
    return write_dense(tmp_path / "tiny", num_hidden_layers=2)


def test_the_same_request_is_made_once_and_what_is_damaged_again(prefect_server, dense, tmp_path):
    folder, made = once(str(dense), str(tmp_path / "runs"), CONFIG)
    digest = folder_digest(folder)
    assert once(str(dense), str(tmp_path / "runs"), CONFIG) == (folder, made)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    again, made_again = once(str(dense), str(tmp_path / "runs"), CONFIG)
    assert again == folder
    assert made_again > made
    assert folder_digest(folder) == digest
    # what was made again is found again
    assert once(str(dense), str(tmp_path / "runs"), CONFIG) == (folder, made_again)


def _cut(file: Path) -> None:
    os.truncate(file, 40)


@pytest.mark.parametrize("first_ratios", [(), (0.1,)])
@pytest.mark.parametrize(
    ("name", "damage"),
    [("tokenizer.json", _cut), ("pruning.json", Path.unlink), ("pruning.json", _cut), ("lineage.json", _cut)],
)
def test_a_file_beside_the_weights_that_is_lost_or_cut_is_made_again(
    prefect_server, dense, tmp_path, first_ratios, name, damage
):
    """It was called intact, and an error came later, each time that the same was asked for."""
    request = (str(dense), str(tmp_path / "runs"), CONFIG, first_ratios)
    folder, _ = once(*request)
    digest, before = folder_digest(folder), load_lineage(folder)
    damage(folder / name)
    again, made_again = once(*request)
    assert (again, folder_digest(again)) == (folder, digest)
    assert [step.output for step in load_lineage(folder).steps] == [step.output for step in before.steps]
    assert load_report(folder).replayed_layers == 2  # the weights were intact
    assert once(*request) == (folder, made_again)


def test_another_model_config_or_text_is_another_folder(prefect_server, dense, tmp_path):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text, word in zip(texts, ("one two three ", "four five six "), strict=True):
        text.write_text(word * 2000)
    where = tmp_path / "text.txt"
    os.link(texts[0], where)
    config = PruneConfig(num_samples=4, seq_len=64, calibration=str(where), ffn_multiple=4)
    runs, folders = str(tmp_path / "runs"), set()
    folders.add(once(str(dense), runs, config)[0])
    where.unlink()
    os.link(texts[1], where)  # the same name, another text
    folders.add(once(str(dense), runs, config)[0])
    folders.add(once(str(dense), runs, PruneConfig(**{**config.to_dict(), "ratio": 0.3}))[0])
    write_dense(dense, num_hidden_layers=2, seed=1)  # the same name, other weights
    folders.add(once(str(dense), runs, config)[0])
    assert len(folders) == 4


def test_two_steps_reach_the_ratio_against_the_dense_model(prefect_server, dense, tmp_path):
    """Of the second step's own model it is less: what the first one reached is known by then."""
    text, runs = dataclasses.replace(CONFIG, ratio=0.4), tmp_path / "runs"
    folder, made = once(str(dense), str(runs), text, (0.2,))
    lineage = load_lineage(folder)
    assert [step.step for step in lineage.steps] == ["prune", "prune"]
    first, second = (step.figures["ratio"] for step in lineage.steps)
    assert lineage.ratio == pytest.approx(1 - (1 - first) * (1 - second))
    assert lineage.steps[1].config["ratio"] == pytest.approx(1 - 0.6 / (1 - first), abs=1e-6)
    assert lineage.ratio == pytest.approx(0.4, abs=0.02)
    assert not (folder.parent / "stages" / "1-prune").exists()  # keep is "last"
    assert once(str(dense), str(runs), text, (0.2,)) == (folder, made)  # and is not needed for finding the result again
    one_step, _ = once(str(dense), str(runs), text)
    assert one_step != folder


def test_with_keep_all_the_first_steps_model_stays_and_a_damaged_result_is_made_of_it_again(
    prefect_server, dense, tmp_path
):
    text, runs = dataclasses.replace(CONFIG, ratio=0.4), str(tmp_path / "runs")
    folder, made = once(str(dense), runs, text, (0.2,), "all")
    between, digest = folder.parent / "stages" / "1-prune", folder_digest(folder)
    (step,) = load_lineage(between).steps
    assert step.output == load_lineage(folder).steps[1].input
    first_made = (between / "pruning.json").stat().st_mtime_ns
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    again, made_again = once(str(dense), runs, text, (0.2,), "all")
    assert (again, folder_digest(again)) == (folder, digest)
    assert made_again > made
    assert (between / "pruning.json").stat().st_mtime_ns == first_made


def test_keep_holds_also_where_an_earlier_run_kept_otherwise(prefect_server, dense, tmp_path):
    """The finished result was found, and what was asked for of the steps before it was passed over."""
    request = (str(dense), str(tmp_path / "runs"), dataclasses.replace(CONFIG, ratio=0.4), (0.2,))
    made = once(*request, "last")
    between = made[0].parent / "stages" / "1-prune"
    assert not between.exists()
    assert once(*request, "all") == made
    assert load_lineage(between).steps[0].output == load_lineage(made[0]).steps[1].input
    assert once(*request, "last") == made
    assert not between.exists()


@pytest.mark.parametrize(
    ("first_ratios", "words"), [((0.5,), "must rise"), ((0.2, 0.2), "must rise"), ((0.0,), "rise")]
)
def test_ratios_that_do_not_rise_are_refused(first_ratios, words):
    with pytest.raises(ValueError, match=f"first_ratios is .* and ratio is 0.4; .*{words}"):
        prune_stages(dataclasses.replace(CONFIG, ratio=0.4), first_ratios)


def test_layer_ratios_are_those_of_one_pruning():
    config = PruneConfig(ratio=0.3, schedule="explicit", layer_ratios=(0.2, 0.4))
    with pytest.raises(ValueError, match="schedule is 'explicit' and first_ratios is given"):
        prune_stages(config, (0.1,))


def test_a_later_step_that_cannot_work_is_refused_before_the_first_begins(prefect_server, dense, tmp_path):
    """The second step's model has too little left: known from the widths that the first one plans."""
    config = dataclasses.replace(CONFIG, ratio=0.8, targets="ffn")
    with pytest.raises(ValueError, match="stage 2 of 2: .*ratio"):
        once(str(dense), str(tmp_path / "runs"), config, (0.2,))
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def test_the_disk_that_all_steps_need_is_known_before_the_first(prefect_server, dense, tmp_path):
    with disable_run_logger():
        steps = prune_stages(dataclasses.replace(CONFIG, ratio=0.4), (0.1, 0.2))
        chain = plan_chain(ResolvedModel("tiny", Checkpoint.open(dense)), steps)
    sizes = [stage.disk_bytes for stage in chain.stages]
    assert sizes == sorted(sizes, reverse=True)
    folder = RunFolder(tmp_path / "run")
    assert chain.missing_bytes(folder, "all") == sum(sizes)
    assert chain.missing_bytes(folder, "last") == sizes[0] + sizes[1]  # a step's source goes when it is finished
    first = chain.outs(folder)[0]
    first.mkdir(parents=True)
    (first / "config.json").touch()  # written last: it is there already
    assert chain.missing_bytes(folder, "all") == sizes[1] + sizes[2]
    folder.model.mkdir()
    (folder.model / "config.json").touch()
    assert chain.missing_bytes(folder, "last") == 0
    assert chain.missing_bytes(folder, "all") == sizes[1]  # asked for, and not there
