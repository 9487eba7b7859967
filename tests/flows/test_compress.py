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

from deploy.bench.config import BenchConfig
from deploy.bundle.folder import verify_bundle
from deploy.engines.availability import vllm_obstacle
from flows.cli.flags import config_from, read_config_file
from flows.compress import compress
from flows.defaults import BENCH, EVALUATION, PRUNE, QUANTIZE, RECOVER
from slimgpt.config import EvalConfig, PruneConfig
from slimgpt.evaluation.harness import EvalResult
from tasks.environment import RunFolder, Workspace
from tasks.registry.config import RegistryConfig
from tasks.registry.fetching import fetch_model
from tasks.registry.gates import GateConfig
from tasks.registry.promotion import PromotionRefusedError, promote
from tasks.registry.runs import RegistrationInput
from tests.tasks.registry import finished_run
from tests.tiny_models import write_dense

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.minutes]
LAYERS = 3
HASTY = EvalConfig(tasks=("none",), perplexity="python", seq_len=64, max_blocks=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("compress")


@pytest.fixture(scope="module")
def parameters(place):
    # head_dim 32 is the smallest that vLLM's CPU kernels take
    dense = write_dense(
        place / "tiny",
        num_hidden_layers=LAYERS,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
    )
    return {
        "model": str(dense),
        "runs": str(place / "runs"),
        "registry": RegistryConfig(machine_seconds=0.2),
        "prune": PruneConfig(num_samples=4, seq_len=64, calibration="python", ffn_multiple=16),
        "evaluation": EvalConfig(tasks=("continuation",), limit=4, perplexity="python", seq_len=64, max_blocks=2),
        "bench": BenchConfig(
            num_prompts=4,
            input_len=16,
            output_len=32,
            pairs=1,
            load_shares=(),
            offline=False,
            num_warmups=1,
            enforce_eager=True,
            show_drift=False,
            kvcache_gib=1,
            dtype="float32",
        ),
    }


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "registered model's name"),
        ({"prune": PruneConfig(calibration="missing.jsonl", ffn_multiple=16)}, "does not exist"),
        ({"prune": PruneConfig(calibration="python", num_samples=100_000, ffn_multiple=16)}, "ask for at most"),
        ({"evaluation": EvalConfig(tasks=("no_such_task",))}, "no_such_task"),
        ({"model": "nowhere"}, "no folder nowhere"),
        ({"evaluation": EvalConfig(tasks=("none",), perplexity="python", seq_len=4096)}, "evaluation: .*lower seq_len"),
        ({"bench": BenchConfig(input_len=4096)}, "bench: input_len 4096 .* lower one of them"),
    ],
)
def test_bad_requests_end_before_long_work(prefect_server, parameters, tmp_path, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        compress(**{**parameters, "runs": str(tmp_path), **change})
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".html")]


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


def test_a_model_that_vllm_does_not_take_is_said_before_the_work_and_registered(prefect_server, parameters, tmp_path):
    dense = write_dense(tmp_path / "narrow", num_hidden_layers=2, head_dim=16)
    narrow = {**parameters, "model": str(dense), "runs": str(tmp_path / "runs"), "evaluation": HASTY}
    done = compress(**{**narrow, "prune": dataclasses.replace(parameters["prune"], ffn_multiple=4)})
    assert "takes heads of 32, 64" in done.report.markdown.read_text()
    assert done.version.version == "1"


def test_a_dry_run_checks_all_makes_nothing_and_expects_what_the_run_then_makes(prefect_server, parameters, tmp_path):
    training = dataclasses.replace(RECOVER, tokens="1024", seq_len=32, text="python", held_out=2)
    given = {**parameters, "recover": training, "runs": str(tmp_path / "runs"), "skip": ("evaluate", "benchmark")}
    said = compress(**given, dry_run=True)
    assert [stage.name for stage in said.stages] == ["prune", "recover"]
    assert all(stage.seconds > 0 and stage.memory_bytes > 1e8 for stage in said.stages)
    assert not list(tmp_path.rglob("*.safetensors"))
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert client.search_registered_models() == []
    done = compress(**given)
    assert said.folders == (str(done.folder),)
    made = sum(file.stat().st_size for file in (done.folder / "model").glob("*.safetensors"))
    assert [stage.bytes_after for stage in said.stages] == pytest.approx([made, made], rel=0.02)
    assert said.disk_bytes > made
    assert compress(**given, dry_run=True).disk_bytes == 0
    with pytest.raises(ValueError, match="bench: input_len 4096 .* lower one of them"):
        compress(**{**given, "skip": (), "bench": BenchConfig(input_len=4096)}, dry_run=True)


def test_stages_are_left_out_on_request(prefect_server, parameters, tmp_path):
    """And nothing is checked for them: no text, no length, no engine."""
    unusable = {"evaluation": EvalConfig(perplexity="nowhere.txt", seq_len=4096), "bench": BenchConfig(input_len=4096)}
    given = {**parameters, **unusable, "name": "quick-slim", "runs": str(tmp_path / "runs")}
    done = compress(**given, skip=("evaluate", "benchmark"))
    assert not list(done.folder.glob("evaluation-*.json")) and not (done.folder / "bench").exists()
    text = done.report.markdown.read_text()
    assert "Skipped: evaluation: left out on request" in text and "Skipped: benchmark: left out on request" in text
    assert "Perplexity" not in text and "Projection parameters removed" in text
    assert "Perplexity" not in (done.folder / "bundle" / "README.md").read_text()
    version = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").get_model_version_by_alias(
        "quick-slim", "challenger"
    )
    assert (version.tags["evaluation"], version.tags["benchmark"]) == ("skipped", "skipped")
    with pytest.raises(PromotionRefusedError, match="no perplexity was measured; .* no throughput was measured"):
        promote("quick-slim", 1, "champion", GateConfig(), Workspace.at(tmp_path / "runs"))
    assert verify_bundle(done.folder / "bundle") == []


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
