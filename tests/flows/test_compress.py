"""All steps on a tiny random model: real Prefect, real MLflow on SQLite, and real vLLM where it can run."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from mlflow import MlflowClient
from mlflow.pyfunc import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.bundle.folder import verify_bundle
from deploy.engines.availability import vllm_obstacle
from flows.cli.flags import config_from, read_config_file
from flows.compress import compress
from flows.defaults import BENCH, EVALUATION, PRUNE, QUANTIZE, RECOVER
from slimgpt.evaluation.harness import EvalResult
from tasks.environment import RunFolder, Workspace
from tasks.registry.fetching import fetch_model
from tasks.registry.gates import GateConfig
from tasks.registry.promotion import PromotionRefusedError, promote
from tasks.registry.runs import RegistrationInput
from tests.flows.small_compress import LAYERS, small_parameters
from tests.tasks.registry import finished_run

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.minutes]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("compress")


@pytest.fixture(scope="module")
def parameters(place):
    return small_parameters(place)


@pytest.fixture(scope="module")
def done(prefect_server, parameters):
    return compress(**parameters)


@pytest.fixture(scope="module")
def client(done, place):
    return MlflowClient(f"sqlite:///{place}/runs/mlflow.db")


def test_the_version_is_registered_and_challenger(done, client):
    version = client.get_model_version_by_alias("tiny-slim", "challenger")
    assert (str(version.version), version.status, version.run_id) == ("1", "READY", done.version.run_id)
    assert version.tags["base_model"] == "tiny"
    assert float(version.tags["ratio"]) == pytest.approx(0.25, abs=0.005)
    assert float(version.tags["perplexity"]) > 1
    assert version.tags["dtype"] == "float32"
    assert "tiny without" in version.description
    if not vllm_obstacle():
        assert float(version.tags["speedup"]) > 0


def test_one_run_holds_parameters_metrics_data_and_files(done, client):
    run = client.get_run(done.version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["prune.ratio"] == "0.25"
    assert run.data.params["evaluation.limit"] == "4"
    assert run.data.params["prune.dtype"] == run.data.params["evaluation.dtype"] == "float32"  # what auto was
    assert run.data.params["model"] == "tiny"  # not the path of this machine
    for layer in ("layer/ffn_error", "layer/num_attention_heads"):
        assert [point.step for point in client.get_metric_history(run.info.run_id, layer)] == list(range(LAYERS))
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    report = done.report.comparison
    nested = client.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    perplexities = {child.data.tags["side"]: child.data.metrics["python/perplexity"] for child in nested}
    assert perplexities == {side: getattr(report, side)["python/perplexity"] for side in ("dense", "pruned")}
    assert run.data.metrics["pruned/python/perplexity"] == pytest.approx(report.pruned["python/perplexity"])
    if not vllm_obstacle():
        assert {f"bench/{name}" for name in report.bench.metrics} <= set(run.data.metrics)
    assert run.data.metrics["pruning/parameters_after"] == report.lineage.after("parameters")
    used = {(item.tags[0].value, item.dataset.name): item.dataset.digest for item in run.inputs.dataset_inputs}
    assert report.lineage.steps[0].data["sha256"].startswith(used["calibration", "python"])
    assert {context for context, _ in used} == {"calibration", "evaluation"}
    assert [model.model_id for model in run.outputs.model_outputs] == [done.version.model_id]
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    expected = {"report.html", "report.md", "pruning.json", "lineage.json", "plots"}
    expected |= {"evaluation-dense.json", "evaluation-pruned.json"}
    assert files == expected | (set() if vllm_obstacle() else {"bench.json"})
    assert {"plots/widths.svg", "plots/errors.svg"} <= {
        file.path for file in client.list_artifacts(run.info.run_id, "plots")
    }


def test_the_fetched_model_is_the_bundles_model_byte_for_byte_and_writes(done, place):
    workspace = Workspace.at(place / "runs")
    folder = fetch_model("models:/tiny-slim@challenger", workspace)
    for uri in ("models:/tiny-slim/1", f"runs:/{done.version.run_id}", f"models:/{done.version.model_id}"):
        assert fetch_model(uri, workspace) == folder
    assert _sums(folder) == _sums(done.folder / "bundle" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert sum(p.numel() for p in model.parameters()) == done.report.comparison.lineage.after("parameters")
    prompt = AutoTokenizer.from_pretrained(folder)("def", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_mlflows_own_loader_predicts_what_transformers_generates(done, place, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    loaded = load_model("models:/tiny-slim@challenger")
    texts = loaded.predict([{"prompt": "The for statement"}, {"prompt": "A"}], params={"max_new_tokens": 6})
    folder = fetch_model("models:/tiny-slim@challenger", Workspace.at(place / "runs"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("The for statement", return_tensors="pt")
    new = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert len(texts) == 2
    assert texts[0] == tokenizer.decode(new, skip_special_tokens=True)


def test_nothing_registered_is_a_pickle_or_names_a_folder_of_this_machine(done, place):
    # Python's own cache of the loader, written when the test before this one loaded the model where it lies, is no part
    files = [path for path in (place / "runs" / "mlflow-artifacts").rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    assert any(path.name == "MLmodel" for path in files)
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".bin", ".pt", ".pth")]
    leaks = [
        path
        for path in files
        if any(str(folder).encode() in path.read_bytes() for folder in (place, Path.cwd(), Path.home()))
    ]
    assert leaks == []


def test_the_ui_has_parameters_and_artifacts(done):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as server:
        run = server.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
        artifacts = {artifact.key: artifact for artifact in server.read_artifacts() if artifact.flow_run_id == run.id}
    assert run.parameters["prune"]["ratio"] == 0.25
    assert artifacts["compress-pruning"].data == 100.0
    assert "| Parameters |" in artifacts["compress-report"].data
    assert "alias `challenger`" in artifacts["compress-report"].data
    table = json.loads(artifacts["compress-figures"].data)
    assert {"figure", "dense", "pruned", "change"} == set(table[0])
    assert "Perplexity, python" in [row["figure"] for row in table]
    if not vllm_obstacle():
        table = json.loads(artifacts["compress-benchmark"].data)
        assert "Throughput, new tokens" in [row["figure"] for row in table]
        assert artifacts["compress-benchmark"].description.startswith("Benchmark: vLLM ")


def test_the_bundles_card_holds_the_runs_own_figures(done):
    for folder in (done.folder / "bundle", done.folder / "bundle" / "model"):
        data = ModelCard.load(folder / "README.md").data
        figures = {result.metric_name: result.metric_value for result in data.eval_results}
        measured = done.report.comparison.pruned
        assert figures == {name: value for name, value in measured.items() if not name.endswith("_stderr")}
        assert len(figures) == 3  # perplexity, acc, acc_norm


def test_the_bundle_is_complete_and_the_report_says_what_was_used_or_skipped(done):
    assert verify_bundle(done.folder / "bundle") == []
    text = done.report.markdown.read_text()
    assert "Calibration: python (python), 4 x 64 tokens." in text
    assert "first 4 documents of each task" in text
    if reason := vllm_obstacle():
        assert f"Skipped: benchmark: {reason}" in text
    else:
        assert "| Throughput, new tokens |" in text
        (load,) = json.loads((done.folder / "bench" / "bench.json").read_text())["loads"]
        assert load["name"] == "full"


def test_the_report_names_the_file_that_repeats_the_run(done, parameters, tmp_path):
    """As a user would: copy it out of the report, save it, name it."""
    text = done.report.markdown.read_text()
    (tmp_path / "run.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    sections = {"prune": PRUNE, "recover": RECOVER, "quantize": QUANTIZE, "evaluation": EVALUATION, "bench": BENCH}
    plain = ("model", "name", "first_ratios", "rounds", "keep", "skip", "revision", "runs")
    read = read_config_file(str(tmp_path / "run.yaml"), sections, plain)
    assert (read["first_ratios"], read["keep"]) == ([], "last")
    for section, defaults in sections.items():
        expected = parameters.get(section, defaults)
        if section in ("prune", "evaluation"):  # another machine's auto may be another dtype
            expected = dataclasses.replace(expected, dtype="float32")
        assert config_from(defaults, read[section]) == expected
    assert read["name"] == "tiny-slim"
    assert read["model"] == Path(parameters["model"]).name  # no path of this machine
    assert f"slimgpt serve models:/tiny-slim@{done.version.alias}" in text


def test_an_upload_that_fails_moves_no_alias_and_registers_nothing(done, place, client):
    request = _registration(done, place / "no-such-folder")
    with pytest.raises(FileNotFoundError):
        finished_run.registered(request, Workspace.at(place / "runs"))
    assert len(client.search_model_versions("name='tiny-slim'")) == 1
    assert client.get_model_version_by_alias("tiny-slim", "challenger").run_id == done.version.run_id
    newest = client.search_runs([client.get_experiment_by_name("slimgpt").experiment_id], max_results=1)[0]
    assert newest.info.status == "FAILED"
    assert "FileNotFoundError" in newest.data.tags["failure"]


def test_a_benchmark_that_fails_costs_the_speed_and_not_the_version(done, parameters, client):
    """Nothing is pruned or measured again; vLLM is not given the time that it needs to start."""
    hasty = dataclasses.replace(parameters["bench"], start_timeout_s=0.1)
    again = compress(**{**parameters, "name": "tiny-hasty", "bench": hasty})
    version = client.get_model_version_by_alias("tiny-hasty", "challenger")
    assert version.tags["benchmark"] == "failed"
    assert "did not answer within 0 s" in version.tags["benchmark_failure"]
    assert "speedup" not in version.tags
    assert client.get_run(again.version.run_id).info.status == "FINISHED"
    assert "Skipped: benchmark: it failed (" in again.report.markdown.read_text()
    with pytest.raises(PromotionRefusedError, match="min_speedup: no throughput was measured"):
        promote("tiny-hasty", 1, "champion", GateConfig(max_perplexity_ratio=0), Workspace.at(parameters["runs"]))


def test_a_second_version_takes_the_alias_and_the_first_stays(done, place, client):
    request = _registration(done, done.folder / "bundle" / "model")
    second = finished_run.registered(request, Workspace.at(place / "runs"))
    assert second.version == "2"
    assert client.get_model_version_by_alias("tiny-slim", "challenger").run_id == second.run_id != done.version.run_id
    assert fetch_model("models:/tiny-slim/1", Workspace.at(place / "runs")).is_dir()


def _registration(done, model: Path) -> RegistrationInput:
    dense, pruned = (
        EvalResult.from_dict(json.loads((done.folder / f"evaluation-{side}.json").read_text()))
        for side in ("dense", "pruned")
    )
    return RegistrationInput(model, {"again": True}, dense, pruned, done.report, RunFolder(done.folder))


def _sums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
