"""The README's own commands, run in its order on a tiny model and with less of everything.

Those that start vLLM (bench, serve, sweep) are left to test_benchmark.py, test_serve.py and test_sweep.py.
"""

import json
import sys

import pytest
from mlflow import MlflowClient

from flows.cli import app
from tests.flows.test_readme import commands
from tests.tiny_models import write_dense

CALIBRATION = "--calibration python --num-samples 4 --seq-len 64 --ffn-multiple 4"
SMALLER = {
    "prune": CALIBRATION,
    "eval": "--tasks none --perplexity python --seq-len 64 --max-blocks 2",
    "compress": f"--model tiny {CALIBRATION} --evaluation.tasks none --evaluation.perplexity python"
    " --evaluation.seq-len 64 --evaluation.max-blocks 2",
    # a random model without a benchmark
    "promote": "--min-accuracy-retention 0 --min-speedup 0 --max-perplexity-ratio 0",
}
RUN = ("prune", "inspect", "eval", "package", "compress", "promote")


def smaller(words):
    """The command with these flags in the place of the README's."""
    flags = SMALLER.get(words[0], "").split()
    for flag in flags[::2]:
        if flag in words:
            at = words.index(flag)
            words = words[:at] + words[at + 2 :]
    return words + flags


@pytest.mark.slow
def test_the_commands_of_the_readme_run_one_after_the_other(prefect_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIMGPT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setitem(sys.modules, "vllm", None)  # else compress measures for a minute
    write_dense(tmp_path / "tiny")
    done = []
    for words in commands("slimgpt"):
        if words[1] not in RUN:
            continue
        app(smaller([word.replace("smollm2", "tiny") for word in words[1:]]), result_action="return_value")
        done.append(words[1])
    assert set(done) == set(RUN)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["ratio"] == pytest.approx(0.25, abs=0.005)
    assert (tmp_path / "bundle" / "serve.sh").is_file()
    aliases = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").get_registered_model("tiny-slim").aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {"challenger": 1, "champion": 1}
