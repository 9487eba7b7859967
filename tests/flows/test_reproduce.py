"""Tables of the paper run on a tiny model with real servers: every run a child flow, and none measured twice."""

import json

import pytest
from mlflow import MlflowClient

from deploy.engines.availability import vllm_obstacle
from flows.cli.app import app, main
from flows.paper.attempts import ReproduceConfig
from flows.reproduce import reproduce
from slimgpt.data.text import calibration_text, perplexity_text
from tasks.steps.benchmarking import Benchmark
from tests.tiny_models import write_dense

pytestmark = pytest.mark.slow
CONFIG = {"samples_share": 1 / 64, "max_blocks": 4}


def write_long(folder, **shape):
    """A model that reads the protocol's 2048 tokens."""
    config = write_dense(folder, **shape) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))


@pytest.fixture(scope="module")
def place(prefect_server, tmp_path_factory):
    """A tiny model, and data of the names that the protocol reads: the text that ships with Python."""
    place = tmp_path_factory.mktemp("reproduce")
    write_long(place / "tiny")
    for folder in ("c4", "wikitext-2-raw", "alpaca"):
        (place / "data" / folder).mkdir(parents=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in calibration_text("python").documents)
    (place / "data/c4/train.jsonl").write_text(rows)
    for split in ("test", "valid"):
        (place / f"data/wikitext-2-raw/wiki.{split}.raw").write_text(perplexity_text("python").documents[0])
    pair = {"instruction": "Name a colour.", "input": "", "output": "Blue is a colour that many people like."}
    (place / "data/alpaca/train.jsonl").write_text((json.dumps(pair) + "\n") * 320)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMGPT_DATA", str(place / "data"))
        patch.delenv("MLFLOW_TRACKING_URI")
        yield place


def run(place, table, **config):
    given = ReproduceConfig(**CONFIG, **config)
    return reproduce(table, str(place / "tiny"), given, str(place / "docs/reproduction.md"), str(place / "runs"))


def test_a_table_of_runs_with_recovery(place):
    """The dense model, a pruned one and its recovery; the models go when they are measured."""
    measured = run(place, "llama-13b", only=("dense", "p50"), measures=("parameters", "perplexity", "seconds"))
    assert [(one.run, one.side) for one in measured] == [("dense", "dense"), ("p50", "pruned"), ("p50", "recovered")]
    dense, pruned, recovered = (one.figures for one in measured)
    assert pruned["parameters"] == recovered["parameters"] < dense["parameters"]
    assert pruned["seconds"] > 0 and "seconds" not in recovered
    assert len({figures["perplexity"] for figures in (dense, pruned, recovered)}) == 3
    assert not list((place / "runs/reproduction").glob("*/model"))
    assert "(0.015625 of the sequences, 4 blocks of text)" in (place / "docs/reproduction.md").read_text()
    client = MlflowClient(f"sqlite:///{place}/runs/mlflow.db")
    [experiment] = [one for one in client.search_experiments() if one.name == "reproduction"]
    runs = [one.info for one in client.search_runs([experiment.experiment_id])]
    names = {one.run_name: one.status for one in runs if one.run_name.startswith("llama-13b/")}
    assert names == {"llama-13b/dense": "FINISHED", "llama-13b/p50 50%": "FINISHED"}


def test_a_second_call_measures_only_what_is_not_known(place):
    config = {"measures": ("parameters", "perplexity_test")}
    first = run(place, "lengths", only=("t64",), **config)
    file = place / "docs/reproduction.json"
    before = file.read_bytes()
    assert run(place, "lengths", only=("t64",), **config) == first
    assert file.read_bytes() == before
    both = run(place, "lengths", only=("t64", "t128"), keep_models=True, **config)
    assert {(one.run, one.ratio) for one in both} == {("t64", 0.5), ("t128", 0.5), ("t64", 0.2), ("t128", 0.2)}
    assert all(one in both for one in first)
    assert len(list((place / "runs/reproduction").glob("*/model"))) == 2  # of t128 alone
    perplexities = [one.figures["perplexity_test"] for one in both]
    assert len(set(perplexities)) == 4


@pytest.mark.vllm
@pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")
def test_the_table_of_speeds_is_measured_with_vllm(place):
    """Milliseconds a token of both models; heads of 32 are the smallest that vLLM's CPU kernels take."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    write_long(place / "served", hidden_size=128, intermediate_size=256, **heads)
    config = ReproduceConfig(samples_share=1 / 64, limit=2, only=("p20",))
    page, runs = str(place / "docs/reproduction.md"), str(place / "runs")
    [one] = reproduce("inference", str(place / "served"), config, page, runs)
    assert one.figures.keys() == {"parameters", "latency", "latency_dense"}
    assert min(one.figures["latency"], one.figures["latency_dense"]) > 0


@pytest.mark.skipif(bool(vllm_obstacle()), reason=vllm_obstacle() or "vLLM runs here")
def test_a_server_that_fails_ends_in_one_line(place, monkeypatch, capsys):
    """What users can mend, such as too little memory, is no fault of ours with a traceback."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    write_long(place / "failing", hidden_size=128, intermediate_size=256, **heads)
    failed = Benchmark(None, "benchmark: it failed (out of memory)", failed="out of memory")
    monkeypatch.setattr("flows.reproduce.benchmark", lambda *_: failed)
    words = f"reproduce inference --model {place}/failing --only p20 --samples-share 0.015625 --limit 2"
    monkeypatch.setattr(
        "sys.argv", ["slimgpt", *words.split(), "--page", str(place / "failed.md"), "--runs", str(place)]
    )
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error: benchmark: it failed (out of memory)" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_refused_before_the_first_run(place):
    (place / "file").touch()
    model, runs = str(place / "tiny"), str(place / "runs")
    with pytest.raises(ValueError, match="page is 'figures.json'; it must be a Markdown file, such as docs/reprod"):
        reproduce("lengths", model, ReproduceConfig(), "figures.json", runs)
    with pytest.raises(OSError, match="file cannot be written to .*; choose another folder"):
        reproduce("lengths", model, ReproduceConfig(), str(place / "file/page.md"), runs)


def test_the_command_line_and_its_dry_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = "reproduce ablations --model tiny --only full,head-diagonal --samples-share 0.015625 --max-blocks 4"
    app(f"{words} --measures parameters,perplexity --runs runs --dry-run".split(), result_action="return_value")
    shown = capsys.readouterr().out
    assert "ablations/full 50%" in shown and "ablations/head-diagonal 20%" in shown
    app(f"{words} --measures parameters,perplexity --runs runs".split(), result_action="return_value")
    shown = capsys.readouterr().out
    assert "head-diagonal 50% pruned" in shown and "docs/reproduction.md" in shown
    with pytest.raises(ValueError, match="the data of task mmlu is not available"):
        app(
            ["reproduce", "llama-2-7b", "--model", "tiny", "--measures", "mmlu", "--dry-run"],
            result_action="return_value",
        )


@pytest.mark.parametrize("taken", ["page.md", "page.json"])
def test_a_folder_in_the_pages_place_is_refused_before_the_first_run(tmp_path, taken):
    (tmp_path / taken).mkdir()
    with pytest.raises(ValueError, match=f"page is .*, and {tmp_path}/{taken} is a folder; give another name"):
        reproduce.fn("llama-7b", page=str(tmp_path / "page.md"), runs=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
