"""A stage's OUT folder that holds something else, or whose file about its run is damaged."""

import pytest

from slimgpt.checkpoints.stage_folder import check_out

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
