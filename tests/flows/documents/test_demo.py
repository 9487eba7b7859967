"""`make demo` on the real model, with less of everything: the same steps in a third of the time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deploy.bundle.folder import verify_bundle
from deploy.engines.availability import vllm_obstacle
from slimgpt.report import load_report
from tests.flows.documents.test_readme import ROOT
from tests.vllm_environment import as_users_have_it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.minutes,
    pytest.mark.all,
    pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here"),
]
LESS = (
    "--num-samples 8 --seq-len 512 --evaluation.limit 2 --evaluation.max-blocks 2 "
    "--bench.pairs 1 --no-bench.show-drift --bench.enforce-eager"
)


def test_the_demo_measures_registers_and_reports_the_built_in_model(tmp_path):
    recipe = re.search(r"^demo:.*\n\t\$\(BIN\)/slimgpt (.*) \$\(ARGS\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    env = {name: v for name, v in as_users_have_it(os.environ).items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    env |= {"SLIMGPT_RUNS": str(tmp_path / "runs"), "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [Path(sys.executable).with_name("slimgpt"), *recipe[1].split(), *LESS.split()]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "runs" / "smollm2-slim").iterdir()
    report = load_report(folder / "model")
    assert (len(report.layers), report.parameters_before) == (30, 134_515_008)
    assert report.ratio == pytest.approx(0.25, abs=0.005)
    assert verify_bundle(folder / "bundle") == []
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    version = client.get_model_version_by_alias("smollm2-slim", "challenger")
    metrics = client.get_run(version.run_id).data.metrics
    (text,) = re.findall(r"^dense/(\w+)/perplexity$", "\n".join(metrics), re.MULTILINE)  # SLIMGPT_DATA decides which
    assert 1 < metrics[f"dense/{text}/perplexity"] < metrics[f"pruned/{text}/perplexity"] < 500
    assert metrics["bench/ratio/output_throughput"] > 0
    assert "| Throughput, new tokens |" in (folder / "report.md").read_text()
