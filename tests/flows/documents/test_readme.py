"""What README and docs tell people to type is understood: commands, flags, make targets, config files, the Python."""

import re
import shlex
from pathlib import Path

import pytest

from flows.cli.app import app
from flows.cli.flags import read_config_file
from flows.defaults import BENCH, EVALUATION, PRUNE
from flows.settings import document
from slimgpt.config import PruneConfig
from slimgpt.engine.pruner import prune

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
DOCS = "\n".join(path.read_text() for path in [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))])


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(first, text=README):
    scripts = (block.replace("\\\n", " ") for block in blocks("sh", text))
    lines = [shlex.split(line, comments=True) for script in scripts for line in script.splitlines()]
    return [line for line in lines if line[:1] == [first]]


@pytest.mark.parametrize("command", commands("slimgpt", README + DOCS), ids=" ".join)
def test_every_slimgpt_command_is_understood(command):
    function, bound, _ = app.parse_args(command[1:], exit_on_error=False, print_error=False)
    assert function.__name__ in (command[1], "evaluate")
    assert bound.arguments


def test_every_make_target_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {line[1] for line in commands("make")} >= {"demo", "test"}
    assert {word for line in commands("make", README + DOCS) for word in line[1:] if "=" not in word} <= set(targets)


def test_every_link_to_a_file_leads_somewhere():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_table_of_settings_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text() == document(), "python -m flows.settings > docs/settings.md"


def test_the_config_file_is_accepted(tmp_path):
    (tmp_path / "c.yaml").write_text(blocks("yaml")[0])
    sections = {"prune": PRUNE, "evaluation": EVALUATION, "bench": BENCH}
    assert read_config_file(str(tmp_path / "c.yaml"), sections, ("model",))["model"] == "smollm2"


def test_every_option_of_the_method_that_it_names_exists():
    known = {"--preset"} | {f"--{name.replace('_', '-')}" for name in PruneConfig.__dataclass_fields__}
    named = set(re.findall(r"`(--[a-z-]+)", README.split("**Options of the method**")[1].split("\n\n")[0]))
    assert len(named) > 5
    assert named <= known


def test_the_python_example_runs(tmp_path, monkeypatch):
    from tests.tiny_models import write_dense

    code = next(block for block in blocks("python") if "PruneConfig" in block)
    code = code.replace('calibration="c4.jsonl"', 'calibration="python", num_samples=4, seq_len=64, ffn_multiple=4')
    monkeypatch.chdir(tmp_path)
    write_dense(tmp_path / "path" / "to" / "model")
    scope = {}
    exec(code, scope)  # the README's own lines
    assert scope["report"].ratio == pytest.approx(0.25, abs=0.005)
    assert scope["prune"] is prune
