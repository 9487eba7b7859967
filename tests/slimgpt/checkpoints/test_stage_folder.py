"""A stage's OUT folder that holds something else, or whose file about its run is damaged."""

import pytest

from slimgpt.checkpoints.stage_folder import check_out
from slimgpt.config import PruneConfig, QuantizeConfig, RecoverConfig
from slimgpt.engine.plan import plan
from slimgpt.engine.pruner import prune
from slimgpt.quantization.quantizer import quantize
from slimgpt.recovery.recoverer import recover
from tests.no_root import run_bound
from tests.tiny_models import write_dense

RUN = {"model": "1234", "threads": 2}


@pytest.mark.parametrize("run", ["[]", "null", '"x"'])
def test_a_damaged_file_about_the_run_is_named(tmp_path, run):
    (tmp_path / "recovery.json").write_text(f'{{"run": {run}}}')
    with pytest.raises(ValueError, match=r"recovery.json is damaged: its run is .*, not an object; name another OUT"):
        check_out(tmp_path, "recovery.json", RUN, "training", "slimgpt recover")


@pytest.mark.parametrize("text", ["", '{"run": {', "[]"])
def test_what_is_no_object_is_ours_and_cannot_be_downloaded_again(tmp_path, text):
    (tmp_path / "recovery.json").write_text(text)
    with pytest.raises(ValueError, match=r"recovery.json is damaged: .*; name another OUT$"):
        check_out(tmp_path, "recovery.json", RUN, "training", "slimgpt recover")


@pytest.mark.parametrize("text", ["{}", '{"run": {"model": "1234"}}'])
def test_a_run_of_which_less_was_recorded_is_another_one(tmp_path, text):
    (tmp_path / "recovery.json").write_text(text)
    with pytest.raises(FileExistsError, match=r"holds another training: .*threads was None, now 2; name another OUT"):
        check_out(tmp_path, "recovery.json", RUN, "training", "slimgpt recover")


@pytest.mark.parametrize(
    ("stage", "config"),
    [
        (prune, PruneConfig(calibration="none.txt")),
        (recover, RecoverConfig(tokens="2048", text="none.txt")),
        (quantize, QuantizeConfig(calibration="none.txt")),
    ],
)
def test_an_out_of_something_else_is_refused_before_any_text_or_weight_is_read(tmp_path, stage, config):
    model, out = write_dense(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    message = f"out is not empty and not an output of slimgpt {stage.__name__} .it holds thesis.tex.; name another OUT"
    with pytest.raises(FileExistsError, match=message):
        stage(model, out, config)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


STAGES = """
from slimgpt.config import PruneConfig, QuantizeConfig, RecoverConfig
from slimgpt.engine.plan import plan as prune_plan
from slimgpt.engine.pruner import prune
from slimgpt.quantization.plan import plan as quantize_plan
from slimgpt.quantization.quantizer import quantize
from slimgpt.recovery.plan import plan as recover_plan
from slimgpt.recovery.recoverer import recover
model, out, text = sys.argv[1:]
for stage, plan, config in (
    (prune, prune_plan, PruneConfig(ffn_multiple=8, num_samples=4, seq_len=32, calibration=text)),
    (recover, recover_plan, RecoverConfig(tokens="1k", method="lora", text="none.jsonl")),
    (quantize, quantize_plan, QuantizeConfig(num_samples=4, seq_len=32, calibration=text)),
):
    try:
        stage(model, out, config)
    except OSError as error:
        print(stage.__name__, error)
    try:
        print("missing", *plan(model, config, out).missing, sep="; ")
    except OSError as error:
        print("missing", error)
"""


def test_an_out_that_cannot_be_written_is_refused_first_and_by_the_dry_run(tmp_path, text_file):
    model, shelf = write_dense(tmp_path / "model"), tmp_path / "shelf"
    shelf.mkdir(mode=0o555)
    done = run_bound(STAGES, model, shelf / "out", text_file)
    said = f"{shelf / 'out'} cannot be written to (Permission denied); choose another folder, or change the permissions"
    assert done.stdout.count(said) == 6, done


def test_a_file_that_goes_along_and_cannot_be_read_is_refused_first(tmp_path, text_file):
    model = write_dense(tmp_path / "model")
    (model / "LICENSE").touch(mode=0o000)
    done = run_bound(STAGES, model, tmp_path / "out", text_file)
    assert done.stdout.count(f"{model / 'LICENSE'} goes along with the model, and this user cannot read it") == 6, done
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_that_out_holds_something_else(tmp_path, tiny_config):
    model, out = write_dense(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    (line,) = plan(model, tiny_config(), out).missing
    assert "out is not empty and not an output of slimgpt prune (it holds thesis.tex)" in line
