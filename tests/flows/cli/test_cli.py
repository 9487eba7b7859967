import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest
from transformers import LlamaConfig

from deploy.engines.availability import vllm_obstacle
from flows.cli import app as cli
from flows.cli import show
from flows.cli.finding import flow_parameters
from flows.cli.flags import config_from, several
from flows.cli.sweeping import SweepPrune
from slimgpt.config import EvalConfig, PruneConfig
from tests.tiny_models import write_dense

ROOT = Path(__file__).parents[3]
SMALL = ["--num-samples", "4", "--seq-len", "64", "--calibration", "python", "--ffn-multiple", "8"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def slimgpt(monkeypatch, capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["slimgpt", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def one_line(result):
    code, _, err = result
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert err.rstrip().endswith(lines[0])
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratio", "0.95"], "ratio is 0.95; it must be at most 0.9"),
        (["--ratio=-0.1"], "ratio is -0.1; it must be at least 0"),
        (["--ratio", "much"], 'unable to convert "much" into float'),
        (["--schedule", "steep"], "steep"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--calibration", "missing.jsonl", "--ffn-multiple", "8"], "the text 'missing.jsonl' does not exist"),
        (["--calibration", "python", "--num-samples", "90000", "--ffn-multiple", "8"], "ask for at most"),
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
    result = slimgpt("prune", dense, tmp_path / "out", "--calibration", tmp_path / "empty.jsonl", "--ffn-multiple", "8")
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


def test_dry_run_says_what_would_happen_and_writes_nothing(slimgpt, dense, tmp_path):
    code, out, _ = slimgpt("prune", dense, tmp_path / "out", "--dry-run", *SMALL)
    assert code == 0
    assert "planned widths" in out
    assert "256 tokens" in out
    assert "weight files" in out
    assert not (tmp_path / "out").exists()


def test_export(slimgpt, dense, tmp_path):
    """What it would be, the file, and a wrong name refused before the model is looked for."""
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    assert slimgpt("prune", dense, out, *SMALL)[0] == 0
    code, text, _ = slimgpt("export", out, file, "--type", "q8_0", "--dry-run")
    assert (code, file.exists()) == (0, False)
    assert "architecture deci" in text
    assert slimgpt("export", out, file, "--type", "q8_0")[0] == 0
    assert file.read_bytes()[:4] == b"GGUF"
    assert "name of a file that ends in .gguf" in one_line(slimgpt("export", "nowhere", tmp_path / "out.bin"))


def test_prune_inspect_and_package(slimgpt, dense, tmp_path):
    out, bundle = tmp_path / "out", tmp_path / "bundle"
    code, text, _ = slimgpt("prune", dense, out, *SMALL)
    assert code == 0
    assert "FFN width" in text
    code, text, _ = slimgpt("inspect", out, "--json")
    facts = json.loads(text)
    assert code == 0
    assert facts["pruned"]
    assert facts["config"]["num_samples"] == 4
    assert len(facts["layers"]) == 3
    assert slimgpt("inspect", out, "--plots", tmp_path / "plots")[0] == 0
    for plot in ("widths", "errors"):
        assert ElementTree.parse(tmp_path / "plots" / f"{plot}.svg").getroot().tag.endswith("svg")
    code, text, _ = slimgpt("inspect", dense, "--json")
    assert code == 0
    assert json.loads(text)["layers"][2] == {
        "layer": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
    }
    assert json.loads(text)["parameters"] == facts["parameters_before"]
    assert slimgpt("package", out, bundle, "--name", "tiny")[0] == 0
    assert slimgpt("package", bundle, "--verify")[0] == 0
    (bundle / "serve.yaml").write_text("host: 0.0.0.0\n")
    assert "serve.yaml" in one_line(slimgpt("package", bundle, "--verify"))


def test_recover_says_what_it_will_do_does_it_and_goes_on_with_nothing_else(slimgpt, dense, tmp_path):
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert slimgpt("prune", dense, pruned, *SMALL)[0] == 0
    small = ["--teacher", dense, "--tokens", 512, "--seq-len", 32, "--text", "python"]
    code, text, _ = slimgpt("recover", pruned, out, "--dry-run", *small)
    assert code == 0
    assert "16 steps" in text
    assert "teacher       tiny" in text
    assert not out.exists()
    code, text, err = slimgpt("recover", pruned, out, *small)
    assert code == 0, err
    assert "KL of held-out text" in text
    assert "16/16" in err
    code, text, _ = slimgpt("inspect", out)
    assert "step 2        recover tiny after prune" in text
    other = one_line(slimgpt("recover", pruned, out, *small, "--rank", 2))
    assert "holds another training: rank was 16, now 2" in other


def test_the_papers_preset_gives_way_to_flags(slimgpt, dense, tmp_path):
    code, _, _ = slimgpt("prune", dense, tmp_path / "out", "--preset", "paper", "--ratio", "0.5", *SMALL)
    assert code == 0
    code, text, _ = slimgpt("inspect", tmp_path / "out", "--json")
    facts = json.loads(text)["config"]
    assert (facts["ratio"], facts["first_ratio_share"], facts["ffn_multiple"]) == (0.5, 0.25, 8)
    assert (facts["head_error"], facts["head_budget"], facts["num_samples"]) == ("paper", "ratio", 4)


def test_eval_in_a_log_is_short_and_says_nothing_of_git(dense, tmp_path):
    """lm-eval's bar writes a line per batch where there is no terminal, and it asks git about the current folder."""
    words = ["eval", dense, "--tasks", "continuation", "--limit", "40", "--perplexity", "none", "--batch-size", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_MININTERVAL"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "slimgpt", *map(str, words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(ROOT), "SLIMGPT_RUNS": str(tmp_path / "runs")},
    )
    assert done.returncode == 0, done.stderr
    assert "continuation/acc" in done.stdout
    assert "fatal" not in done.stderr
    assert 0 < done.stderr.count("Running loglikelihood") < 5


def test_eval_prints_and_writes_its_figures(slimgpt, dense, tmp_path):
    flags = [
        "--tasks",
        "continuation",
        "--limit",
        "2",
        "--perplexity",
        "python",
        "--seq-len",
        "64",
        "--max-blocks",
        "1",
    ]
    code, text, err = slimgpt("eval", dense, *flags, "--out", tmp_path / "eval.json")
    assert code == 0, err
    assert "continuation/acc" in text
    assert "the first 2 documents" in text
    assert json.loads((tmp_path / "eval.json").read_text())["metrics"]["python/perplexity"] > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "DENSE", "--out", "."], ". is a folder; give the name of a file in it"),
        (["eval", "DENSE", "--out", "none/eval.json"], "the folder of none/eval.json does not exist; make it first"),
        (["inspect", "DENSE", "--plots", "file"], "file is a file; give the name of a folder"),
        (["inspect", "DENSE", "--plots", "file/plots"], "file is a file; give the name of a folder"),
        (["bench", "DENSE", "DENSE", "--workdir", "file"], "file is a file; give the name of a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    slimgpt, dense, tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slimgpt.evaluation.harness.evaluate", lambda *_, **__: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    assert message in one_line(slimgpt(*(dense if word == "DENSE" else word for word in words)))


def test_what_a_config_file_may_hold(slimgpt, tmp_path):
    file = tmp_path / "c.yaml"
    assert "does not exist" in one_line(slimgpt("compress", "--config", file))
    for text, message in {
        "prune: {ratoi: 0.2}": "prune.ratoi is not known; known are ratio",
        "modle: x": "modle is not known; known are model",
        "prune: 0.2": "prune is 0.2; it must hold settings by name",
        "prune: {ratio: 2}": "ratio is 2; it must be at most 0.9",
        "prune: {ratio: [": "is not YAML",
        "- a": "it must hold the flow's parameters",
        "keep: some": "keep is 'some'; input should be 'last' or 'all'",
        "skip: [benchmark, prune]": "skip is 'prune'; input should be 'evaluate' or 'benchmark'",
        "revision: 1234567": "revision is 1234567; input should be a valid string; put it in quotes",
    }.items():
        file.write_text(text)
        assert message in one_line(slimgpt("compress", "--config", file))
    file.write_text("runs: [a]")
    for command in ("compress", "sweep"):  # the runs folder is needed before the flow, which has the types
        assert "runs is ['a']; input should be a valid string" in one_line(slimgpt(command, "--config", file))


def test_what_a_config_file_leaves_empty_is_not_given(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name:\nruns:\nrevision: null\nmodel: tiny\nrounds: 2\nfirst_ratios: 0.3\nmodels: [a]\n")
    plain = dict.fromkeys(("name", "runs", "revision", "model", "rounds", "first_ratios", "models"))
    parameters = flow_parameters(str(file), {"prune": PruneConfig()}, {"prune": SweepPrune()}, plain)
    assert parameters == {
        **{"model": "tiny", "rounds": 2, "first_ratios": 0.3, "models": ["a"]},
        "prune": PruneConfig(),
    }
    assert several("first_ratios", 0.3, float) == (0.3,)  # a lone number
    assert several("models", ["a", None], str) == ("a",)


def test_flags_win_over_the_file_and_the_file_over_defaults():
    made = config_from(PruneConfig(num_samples=32), {"ratio": 0.4, "seed": 7}, {"ratio": 0.3})
    assert (made.ratio, made.seed, made.num_samples) == (0.3, 7, 32)
    assert config_from(EvalConfig(), {"tasks": "piqa, boolq"}).tasks == ("piqa", "boolq")
    explicit = config_from(PruneConfig(), {"layer_ratios": "0.1,0.2", "schedule": "explicit"})
    assert explicit.layer_ratios == (0.1, 0.2)


@pytest.mark.parametrize(
    "command",
    [
        *("prune", "recover", "quantize", "inspect", "eval", "compress", "promote", "rollback", "serve", "bench"),
        *("package", "export"),
    ],
)
def test_help_shows_defaults_and_imports_nothing_heavy(command):
    code = f"""
import sys
from pathlib import Path
sys.argv = ["slimgpt", "{command}", "--help"]
from flows.cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code
heavy = ("torch", "transformers", "mlflow", "prefect", "lm_eval", "vllm", "datasets")
print("heavy:", [name for name in heavy if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    assert result.returncode == 0, result.stderr
    assert "heavy: []" in result.stdout
    assert "Usage: slimgpt " + command in result.stdout
    if command in ("prune", "recover"):
        assert f"-m slimgpt {command} MODEL OUT" in result.stdout  # what test_ranks.py starts
    if command in ("prune", "compress"):
        assert "[at least 0, at most 0.9] [default: 0.25]" in result.stdout


def test_the_version_is_the_package_s(slimgpt):
    assert slimgpt("--version") == (0, f"{metadata.version('slimgpt')}\n", "")


def test_prefects_line_per_completed_task_is_left_out_and_failures_are_not(slimgpt):
    slimgpt("--version")
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        for message, shown in (("Finished in state Completed()", False), ("Finished in state Failed('no')", True)):
            record = logger.makeRecord(name, logging.INFO, "engine", 1, message, (), None)
            assert bool(logger.filter(record)) is shown


def test_names_are_printed_as_they_are(capsys):
    names = ["tiny[v1]", "x[/y]", "a:cat:"]  # to rich a style, an end without a beginning, a picture
    for name in names:
        show.table(f"{name}: title", (name,), [(f"row {name}",)])
        show.line(f"line {name}")
        printed = capsys.readouterr().out
        assert printed.count(name) == 4 and f"line {name}\n" in printed


def test_a_terminal_without_the_characters_of_a_name_is_no_error(tmp_path):
    write_dense(tmp_path / "läufe")
    command = [sys.executable, "-m", "slimgpt", "inspect", str(tmp_path / "läufe")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "l?ufe: llama, not pruned" in done.stdout, done.stderr


def test_a_dry_run_of_reproduce_looks_into_the_registry_of_its_own_runs(slimgpt, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("SLIMGPT_RUNS", str(tmp_path / "default"))
    words = ["reproduce", "ablations", "--dry-run", "--model", "models:/none@champion"]
    assert "none" in one_line(slimgpt(*words, "--runs", tmp_path / "mine"))
    assert (tmp_path / "mine" / "mlflow.db").is_file() and not (tmp_path / "default").exists()
