"""A mistake on the command line is one line, exit code 2, and leaves nothing."""

import json
import shutil
import socket

import pytest
from transformers import LlamaConfig

from deploy.engines.availability import vllm_obstacle
from tests.flows.cli.lines import one_line
from tests.no_root import run_bound
from tests.tiny_models import write_dense

SHORT = ["--seq-len", "64", "--ffn-multiple", "8"]
SMALL = ["--num-samples", "4", "--calibration", "python", *SHORT]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratio", "0.95"], "ratio is 0.95; it must be at most 0.9"),
        (["--ratio=-0.1"], "ratio is -0.1; it must be at least 0"),
        (["--ratio", "much"], 'unable to convert "much" into float'),
        (["--schedule", "steep"], "steep"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        ([*SHORT, "--calibration", "missing.jsonl"], "the text 'missing.jsonl' does not exist"),
        ([*SHORT, "--calibration", "python", "--num-samples", "90000"], "ask for at most"),
        (["--calibration", "python", "--ffn-multiple", "8"], "reads at most 512 tokens at once: lower seq_len"),
        (["--layer-ratios", "0.1,x"], "layer_ratios is '0.1,x'"),
        (["--measure"], "--measure belongs to --dry-run"),
        (["--num-samples", "8.9"], "'8.9' is not a whole number"),  # cyclopts would make it 9
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(slimgpt, dense, tmp_path, flags, message):
    out = tmp_path / "out"
    assert message in one_line(slimgpt("prune", dense, out, *flags))
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["promote", "tiny", "--version", "3.9"],
        ["serve", "tiny", "--port", "80.5"],
        ["bench", "a", "b", "--pairs", "1.5"],
    ],
)
def test_no_whole_number_is_rounded(slimgpt, words):
    assert f"{words[-2]}: '{words[-1]}' is not a whole number" in one_line(slimgpt(*words))


@pytest.mark.parametrize("words", [["--ratio", "0.25"], ["--ratio", "0.3"]])
def test_a_ratio_and_a_budget_are_refused_also_where_the_ratio_is_the_default(slimgpt, dense, tmp_path, words):
    said = one_line(slimgpt("prune", dense, tmp_path / "out", "--target-size", "1MB", *words))
    assert "ratio and target_size are given, and each says how much is removed; leave one out" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target-speedup", "1.2", "--dry-run"], "and what this model takes here is not measured; `slimgpt latency"),
        (["--target-speedup", "1.2", "--latency", "none.json"], "none.json does not exist; `slimgpt latency MODEL"),
        (["--latency", "none.json"], "--latency is none.json, and no --target-speedup is given"),
        (["--target-speedup", "1.2", "--preset", "paper"], "preset is paper and target_speedup is given"),
        (["--target-speedup", "1.2", "--ratio", "0.25"], "ratio and target_speedup are given"),
        (["--target-speedup", "1.2", "--bos", "block"], "BOS"),  # before anything is measured
    ],
)
def test_a_target_in_speed_that_cannot_work_is_one_line_before_any_work(slimgpt, dense, tmp_path, words, message):
    assert message in one_line(slimgpt("prune", dense, tmp_path / "out", *SMALL, *words))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_bounds_and_a_measured_one_the_widths_that_come_out(slimgpt, dense, tmp_path):
    code, bounds, _ = slimgpt("prune", dense, tmp_path / "out", *SMALL, "--dry-run")
    assert code == 0
    assert "8 -> 1 to 8" in bounds
    assert "the calibration data decide within these bounds" in bounds
    code, measured, _ = slimgpt("prune", dense, tmp_path / "out", *SMALL, "--dry-run", "--measure")
    assert code == 0
    assert " to " not in measured.partition("ratio")[0]
    assert "measured: pruning gives these" in measured
    assert list(tmp_path.iterdir()) == []


def test_an_empty_calibration_file_is_one_line(slimgpt, dense, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    result = slimgpt("prune", dense, tmp_path / "out", "--calibration", tmp_path / "empty.jsonl", *SHORT)
    assert "holds no text" in one_line(result)


def test_models_that_cannot_be_pruned_are_one_line(slimgpt, dense, tmp_path):
    assert "no folder nowhere" in one_line(slimgpt("prune", "nowhere", tmp_path / "out"))
    (tmp_path / "weightless").mkdir()
    LlamaConfig().save_pretrained(tmp_path / "weightless")
    assert "weightless" in one_line(slimgpt("prune", tmp_path / "weightless", tmp_path / "out"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    assert "gpt2" in one_line(slimgpt("prune", tmp_path / "other", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"num_hidden_layers": "3"}, {"per_layer_config": [1]}])
def test_inspect_names_a_config_with_a_value_of_another_kind(slimgpt, dense, tmp_path, settings):
    folder = shutil.copytree(dense, tmp_path / "tiny")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | settings))
    assert f"{folder}/config.json is damaged: " in one_line(slimgpt("inspect", folder))


def test_a_folder_that_holds_something_else_is_refused_and_untouched(slimgpt, dense, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert str(tmp_path) in one_line(slimgpt("prune", dense, tmp_path, *SMALL))
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.safetensors"))
    assert not (tmp_path / "config.json").exists()


def test_a_place_for_results_that_cannot_be_written_is_refused_before_they_are_made(tmp_path):
    """They were lost: eval wrote its file when all was measured, bench its folder, export its file."""
    shelf = tmp_path / "shelf"
    shelf.mkdir(mode=0o555)
    code = """
from deploy.llamacpp.export import check_target
from flows.cli.finding import check_new_file, check_new_folder
shelf = Path(sys.argv[1])
for check in (check_new_file, check_new_folder, lambda out: check_target(None, out)):
    try:
        check(shelf / "out.gguf")
    except PermissionError as error:
        print(error)
"""
    done = run_bound(code, shelf)
    said = f"cannot be written to (Permission denied); choose another folder, or change the permissions of {shelf}"
    assert done.stdout.count(said) == 3, done


def test_a_server_that_does_not_answer_and_a_name_that_is_none(slimgpt, monkeypatch, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{probe.getsockname()[1]}")
    assert "does not answer" in one_line(slimgpt("serve", "models:/a@champion", "--runs", tmp_path))


@pytest.mark.skipif(bool(vllm_obstacle()), reason=f"vLLM cannot run here: {vllm_obstacle()}")
def test_a_port_in_use_is_one_line(slimgpt, tmp_path):
    dense = write_dense(tmp_path / "tiny", head_dim=32)  # vLLM's CPU attention takes no smaller heads
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 cannot be used" in one_line(slimgpt("serve", dense, "--port", port))
