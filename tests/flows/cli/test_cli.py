"""The commands as a user runs them, on a tiny model."""

import json
import logging
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flows.cli import show
from tests.flows.cli.lines import one_line
from tests.tiny_models import write_dense

ROOT = Path(__file__).parents[3]
SMALL = ["--num-samples", "4", "--seq-len", "64", "--calibration", "python", "--ffn-multiple", "8"]


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
