"""The lineage names every step that made a model; a second pruning is a second step, and old folders read as one."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimgpt.modeling  # noqa: F401  makes transformers know pruned checkpoints
from slimgpt.checkpoints.lineage import LINEAGE, Checkpoint, checkpoint_digest, load_lineage
from slimgpt.checkpoints.source import resolve_model
from slimgpt.engine.pruner import prune
from slimgpt.files import file_sha256
from slimgpt.report import load_report

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def twice(tmp_path_factory, dense, tiny_config):
    """The dense model pruned by 15 %, and the result by another 20 %."""
    folder = tmp_path_factory.mktemp("twice")
    first = prune(dense, folder / "first", tiny_config(ratio=0.15, ffn_multiple=8))
    second = prune(folder / "first", folder / "second", tiny_config(ratio=0.2, ffn_multiple=8))
    return folder, first, second


def parameters(folder, names=("",)):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return sum(p.numel() for name, p in model.named_parameters() if any(part in name for part in names))


def test_two_prunings_are_two_steps_and_the_ratio_is_against_the_first_dense_model(twice, dense):
    folder, first, second = twice
    lineage = load_lineage(folder / "second")
    assert [step.step for step in lineage.steps] == ["prune", "prune"]
    assert lineage.base_model == dense.name
    assert [step.figures["ratio"] for step in lineage.steps] == [first.ratio, second.ratio]
    counted = [parameters(it, PROJECTIONS) for it in (dense, folder / "first", folder / "second")]
    assert lineage.ratio == pytest.approx(1 - counted[2] / counted[0])
    assert [(s.figures["projections_before"], s.figures["projections_after"]) for s in lineage.steps] == [
        (counted[0], counted[1]),
        (counted[1], counted[2]),
    ]
    whole = parameters(dense), parameters(folder / "second")
    assert (lineage.before("parameters"), lineage.after("parameters")) == whole
    assert lineage.model_ratio == pytest.approx(1 - whole[1] / whole[0])
    # What was requested of the second is a share of what the first left, not of what it was to leave.
    assert first.ratio != 0.15
    assert lineage.requested_ratio == pytest.approx(1 - 0.8 * counted[1] / counted[0])


def test_a_finished_second_pruning_is_reused_and_one_of_another_ratio_refused(twice, tiny_config):
    """Its journal is its own, not a copy of the first one's."""
    folder, _, second = twice
    assert prune(folder / "first", folder / "second", tiny_config(ratio=0.2, ffn_multiple=8)) == second
    with pytest.raises(FileExistsError, match=r"ratio was 0.2, now 0.3"):
        prune(folder / "first", folder / "second", tiny_config(ratio=0.3, ffn_multiple=8))


def test_layers_lead_from_the_first_models_widths_to_the_last_ones(twice, dense):
    folder, first, second = twice
    lineage = load_lineage(folder / "second")
    for before, after, layer in zip(first.layers, second.layers, lineage.layers, strict=True):
        assert layer.dense_intermediate_size == before.dense_intermediate_size == 128
        assert after.dense_intermediate_size == before.intermediate_size
        assert (layer.intermediate_size, layer.num_attention_heads) == (
            after.intermediate_size,
            after.num_attention_heads,
        )
        assert layer.ffn_error == after.ffn_error
        assert layer.ratio == pytest.approx(1 - (1 - before.ratio) * (1 - after.ratio))


def test_each_step_begins_from_the_digest_that_the_one_before_ended_with(twice, dense):
    folder = twice[0]
    steps = load_lineage(folder / "second").steps
    digests = [checkpoint_digest(it) for it in (dense, folder / "first", folder / "second")]
    assert [(step.input, step.output) for step in steps] == [(digests[0], digests[1]), (digests[1], digests[2])]
    opened = Checkpoint.open(folder / "second")
    assert opened.lineage.since(digests[1]).steps == steps[1:]
    assert opened.lineage.since(digests[0]).steps == steps
    assert opened.lineage.since("of another model").steps == steps


def test_a_dense_model_has_no_steps(dense):
    assert Checkpoint.open(dense).lineage.steps == ()
    assert load_lineage(dense).ratio == 0.0


def test_a_folder_with_pruning_json_alone_reads_as_one_step_and_goes_on_as_two(twice, tmp_path, tiny_config):
    folder, first, _ = twice
    old = shutil.copytree(folder / "first", tmp_path / "old")
    (old / LINEAGE).unlink()
    (step,) = load_lineage(old).steps
    known = load_lineage(folder / "first").steps[0]
    assert (step.figures, step.model, step.layers) == (known.figures, first.base_model, first.layers)
    prune(old, tmp_path / "again", tiny_config(ratio=0.2, ffn_multiple=8))
    again = load_lineage(tmp_path / "again")
    assert [step.output for step in again.steps] == [step.output for step in load_lineage(folder / "second").steps]
    assert again.ratio == load_lineage(folder / "second").ratio


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00006.safetensors"])
def test_a_model_that_was_changed_after_its_last_step_is_refused_before_any_work(twice, tmp_path, tiny_config, name):
    changed = shutil.copytree(twice[0] / "first", tmp_path / "changed")
    path = changed / name
    if name == "config.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.1}))
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="changed after the last step of lineage.json"):
        prune(changed, tmp_path / "out", tiny_config())
    assert not (tmp_path / "out").exists()


def test_a_damaged_or_newer_lineage_says_so(twice, tmp_path):
    folder = shutil.copytree(twice[0] / "first", tmp_path / "model")
    whole = json.loads((folder / LINEAGE).read_text())

    def changed(**figures):
        step = whole["steps"][0]
        kept = {name: value for name, value in {**step["figures"], **figures}.items() if value is not None}
        return json.dumps({**whole, "steps": [{**step, "figures": kept}]})

    for text, reason in (
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 99, "steps": []}', "format is 99"),
        ('{"format": 1, "steps": []}', "it has no list of steps"),  # or it would read as a dense model
        ('{"format": 1, "steps": {}}', "it has no list of steps"),
        (changed(seconds=None), "step prune has no figure seconds"),
        (changed(peak_memory_bytes=None), "step prune has no figure peak_memory_bytes"),
        (changed(seconds="long"), "step prune has no figure seconds"),
    ):
        (folder / LINEAGE).write_text(text)
        with pytest.raises(ValueError, match=reason) as refused:
            load_lineage(folder)
        assert str(folder / LINEAGE) in str(refused.value)


def test_embeddings_of_a_second_pruning_are_a_second_name_of_the_firsts(twice, small_disk, tiny_config):
    folder = twice[0]
    shards = sorted(path.name for path in (folder / "first").glob("*.safetensors"))
    same = [name for name in shards if (folder / "first" / name).samefile(folder / "second" / name)]
    assert same == [shards[0], shards[-1]]

    with small_disk("64M") as other:  # a hard link cannot reach another file system
        prune(folder / "first", other / "copied", tiny_config(ratio=0.2, ffn_multiple=8))
        for name in same:
            assert not (other / "copied" / name).samefile(folder / "first" / name)
            assert file_sha256(other / "copied" / name) == file_sha256(folder / "second" / name)


def test_a_damaged_second_pruning_is_mended_to_the_same_files(twice, tmp_path, tiny_config):
    second = shutil.copytree(twice[0] / "second", tmp_path / "second")
    shards = {path.name: file_sha256(path) for path in second.glob("*.safetensors")}
    for name in shards:  # the first and the last one are links again, the others made again
        (second / name).unlink()  # not written into: it may be another name of the first pruning's file
        (second / name).write_bytes(b"damaged")
        prune(twice[0] / "first", second, tiny_config(ratio=0.2, ffn_multiple=8))
        assert {path.name: file_sha256(path) for path in second.glob("*.safetensors")} == shards
        assert not list(second.glob("*.tmp"))


def test_figures_of_the_model_before_do_not_travel_on(twice, tmp_path, tiny_config):
    first = shutil.copytree(twice[0] / "first", tmp_path / "first")
    (first / "evaluation.json").write_text("{}")
    report = prune(first, tmp_path / "second", tiny_config(ratio=0.2, ffn_multiple=8))
    assert not (tmp_path / "second" / "evaluation.json").exists()
    assert load_report(tmp_path / "second") == report
    assert resolve_model(tmp_path / "second")
