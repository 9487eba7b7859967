"""A stage's OUT folder that holds something else, or whose file about its run is damaged."""

import pytest

from slimgpt.checkpoints.stage_folder import check_out
from slimgpt.config import PruneConfig, QuantizeConfig, RecoverConfig
from slimgpt.engine.pruner import prune
from slimgpt.quantization.quantizer import quantize
from slimgpt.recovery.recoverer import recover
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
