"""Evaluation with the real lm-eval on a tiny model: figures, what they are of, and refusals."""

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from slimgpt.evaluation import harness, harness_tasks
from slimgpt.evaluation.harness import EvalConfig, EvalResult, evaluate, flatten
from slimgpt.evaluation.harness_tasks import PAPER_TASKS, load_tasks
from tests.tiny_models import write_dense


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMGPT_DATA", raising=False)


def test_all_tasks_run_and_metric_names_are_valid_in_mlflow(local_data: Path, tiny: Path) -> None:
    lines: list[str] = []
    config = EvalConfig(tasks=("auto", "wikitext"), perplexity="python", seq_len=64, max_blocks=2)
    result = evaluate(tiny, config, on_progress=lines.append)
    assert {f"{task}/acc" for task in PAPER_TASKS} | {"wikitext/word_perplexity", "python/perplexity"} <= set(
        result.metrics
    )
    assert result.results["results"]["piqa"]["acc,none"] == result.metrics["piqa/acc"]  # the keys everybody knows
    assert "wikitext/word_perplexity_stderr" not in result.metrics  # lm-eval says "N/A"
    assert [(data.name, data.origin) for data in result.texts] == [
        ("python", "python"),
        *[(task, "local data") for task in (*PAPER_TASKS, "wikitext")],
    ]
    assert all(len(data.sha256) == 64 for data in result.texts)
    assert result.results["configs"]["piqa"]["dataset_kwargs"] == {
        "data_files": {"validation": "piqa/validation.jsonl"}
    }
    assert set(result.results["task_hashes"]) == {*PAPER_TASKS, "wikitext"}
    assert "perplexity on python: block 2 of 2" in lines

    written = json.dumps(result.to_dict())
    assert EvalResult.from_dict(json.loads(written)) == result
    private = [str(local_data.parent), str(tiny.parent), str(Path(sys.prefix)), str(Path.home()), "slimgpt-eval-"]
    assert [fact for fact in private if fact in written] == []


def test_folders_whose_names_are_patterns_are_read_and_not_named_in_results(
    local_data: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """datasets would look for a folder ``data 1``; the folder of temporary files holds ``continuation``."""
    data, temporary = local_data.rename(tmp_path / "data [1]"), tmp_path / "t[m]p"
    temporary.mkdir()
    monkeypatch.setenv("SLIMGPT_DATA", str(data))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    result = evaluate(tiny, EvalConfig(tasks="piqa,continuation", limit=2, perplexity="none"))
    assert {"piqa/acc", "continuation/acc"} <= result.metrics.keys()
    assert str(tmp_path) not in json.dumps(result.to_dict())


def test_a_loaded_model_and_its_folder_give_equal_figures(tiny: Path, without_data: None) -> None:
    config = EvalConfig(tasks=("continuation",), limit=12, perplexity="python", seq_len=64, max_blocks=3)
    by_path = evaluate(tiny, config)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    by_object = evaluate("in memory", config, model=model, tokenizer=tokenizer)
    assert by_path.metrics == by_object.metrics
    assert by_path.results["task_hashes"] == by_object.results["task_hashes"]
    assert (by_path.model, by_object.model, by_object.dtype) == ("tiny", "in memory", "float32")
    assert by_path.results["n-samples"]["continuation"]["effective"] == 12


def test_examples_and_chat_template_are_in_the_prompts(tiny: Path, without_data: None) -> None:
    """lm-eval's hashes of documents, prompts and targets differ: no example, one, one as turns of a chat."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    given = {"tasks": ("continuation",), "perplexity": "none", "limit": 2}
    plain = evaluate(tiny, EvalConfig(**given), model=model, tokenizer=tokenizer)
    shot = evaluate(tiny, EvalConfig(**given, num_fewshot=1), model=model, tokenizer=tokenizer)
    chat = evaluate(
        tiny, EvalConfig(**given, num_fewshot=1, apply_chat_template=True), model=model, tokenizer=tokenizer
    )
    assert [result.results["n-shot"]["continuation"] for result in (plain, shot, chat)] == [0, 1, 1]
    assert len({result.results["task_hashes"]["continuation"] for result in (plain, shot, chat)}) == 3
    assert chat.config["apply_chat_template"] is True


def test_examples_for_a_task_that_takes_none_and_a_template_that_is_not_there_are_refused(
    tiny: Path, tmp_path: Path, without_data: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval would measure without examples, and say so in a log that nobody sees."""
    fixed = {**harness_tasks.continuation_definition(), "num_fewshot": 0}
    monkeypatch.setattr(harness_tasks, "continuation_definition", lambda: fixed)
    with pytest.raises(ValueError, match="num_fewshot is 5, but continuation fixes it at 0: measure other tasks"):
        load_tasks(("continuation",), tmp_path, num_fewshot=5)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template: leave apply_chat_template out"):
        evaluate(tiny, EvalConfig(perplexity="none", apply_chat_template=True), tokenizer=tokenizer)


def test_a_group_of_tasks_has_its_own_figures_and_its_tasks_are_not_counted_beside_it(
    tiny: Path, tmp_path: Path, without_data: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mmlu is one: lm-eval aggregates over its tasks where it is given the group."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in harness_tasks.continuation_rows()[:8]))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name in ("first", "second"):
        definition = {**harness_tasks.continuation_definition(), **source, "task": name}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(definition))
    mean = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "pair", "task": ["first", "second"], "aggregate_metric_list": mean}
    (tmp_path / "pair.yaml").write_text(json.dumps(group))
    monkeypatch.setattr(harness, "scratch", lambda _: contextlib.nullcontext(tmp_path))
    monkeypatch.setattr(harness_tasks, "hub_obstacle", str)  # none: the data is in tmp_path
    result = evaluate(tiny, EvalConfig(tasks=("pair",), perplexity="none", limit=4))
    assert result.metrics.keys() == {"pair/acc", "pair/acc_stderr"}
    assert result.metrics["pair/acc"] == result.results["results"]["first"]["acc,none"]  # both are the same
    assert result.results["n-samples"].keys() == {"first", "second"}
    loaded, _ = load_tasks(("pair",), tmp_path)
    assert list(loaded) == ["pair"]
    fixed = {**definition, "num_fewshot": 0}
    (tmp_path / "second.yaml").write_text(json.dumps(fixed))
    with pytest.raises(ValueError, match="num_fewshot is 5, but second fixes it at 0"):
        load_tasks(("pair",), tmp_path, num_fewshot=5)


def test_perplexity_runs_without_tasks(tiny: Path) -> None:
    result = evaluate(tiny, EvalConfig(tasks=(), perplexity="python", seq_len=64, max_blocks=1))
    assert list(result.metrics) == ["python/perplexity"]
    assert result.results == {}


def test_the_requested_dtype_is_used(tiny: Path) -> None:
    config = EvalConfig(tasks="none", perplexity="python", seq_len=64, max_blocks=1, dtype="bfloat16", device="cpu")
    assert evaluate(tiny, config).dtype == "bfloat16"


def test_scores_of_a_bfloat16_model_are_summed_in_float32(tmp_path: Path) -> None:
    """Rounded to 8 bits, the two answers of many a document would have the same score."""
    folder = write_dense(tmp_path / "tiny", dtype=torch.bfloat16)
    config = EvalConfig(tasks="continuation", perplexity="none", limit=8, dtype="bfloat16", device="cpu")
    scored = []
    original = HFLM.loglikelihood
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            HFLM, "loglikelihood", lambda *given, **more: scored.append(original(*given, **more)) or scored[-1]
        )
        evaluate(folder, config)
    sums = torch.tensor([nats for nats, _ in scored[0]], dtype=torch.float32)
    assert len(sums) >= 16
    assert (sums.bfloat16().float() != sums).float().mean() > 0.9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"limit": -1}, "limit is -1; it must be at least 0"),
        ({"seq_len": 1}, "seq_len is 1; it must be at least 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto"),
        ({"tasks": (), "perplexity": "none"}, "nothing would be measured"),
    ],
)
def test_config_is_validated_on_construction(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalConfig(**fields)  # type: ignore[arg-type]


def test_tasks_can_be_a_list_or_text() -> None:
    assert EvalConfig(tasks=["piqa", "boolq"]) == EvalConfig(tasks="piqa, boolq") == EvalConfig(tasks=("piqa,boolq",))


def test_a_wrong_name_is_refused_before_the_model_is_loaded(tmp_path: Path, without_data: None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "none that loads"}')
    with pytest.raises(ValueError, match=r"task 'hellswag' is not known \(did you mean hellaswag") as caught:
        evaluate(tmp_path, EvalConfig(tasks="hellswag"))
    assert "boolq, piqa" in str(caught.value)
    with pytest.raises(ValueError, match="perplexity text is 'wikitxt2'"):
        evaluate(tmp_path, EvalConfig(tasks="continuation", perplexity="wikitxt2"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": "none", "perplexity": "TEXT"}, "fewer than seq_len 64; lower seq_len"),
        ({"tasks": "none", "perplexity": "python", "bos": "block"}, "bos is 'block', but .* has no BOS token"),
        ({"tasks": "none", "perplexity": "ADDED"}, "gives the token 512 for added.txt, its embeddings end at 511"),
        ({"tasks": "continuation", "perplexity": "none"}, "has neither BOS nor EOS, .*or measure perplexity alone"),
    ],
)
def test_what_the_tokenizer_and_the_text_tell_is_refused_before_the_model_is_loaded(
    fields: dict[str, str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without_data: None,
) -> None:
    monkeypatch.setattr(harness, "load_causal_lm", lambda *_: pytest.fail("the model is loaded"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tiny / "tokenizer.json"))  # without BOS, EOS and padding
    tokenizer.add_tokens(["zebra"])
    (tmp_path / "short.txt").write_text("A word.")
    (tmp_path / "added.txt").write_text("A zebra. " * 200)
    files = {"TEXT": str(tmp_path / "short.txt"), "ADDED": str(tmp_path / "added.txt")}
    request = EvalConfig(seq_len=64, **fields | {"perplexity": files.get(fields["perplexity"], fields["perplexity"])})
    with pytest.raises(ValueError, match=message):
        evaluate(tiny, request, tokenizer=tokenizer)


def test_a_folder_without_a_model_and_an_unknown_device_are_refused(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        evaluate(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        evaluate(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"device 'cuda:99' is not usable here .*use cpu, cuda or auto"):
        evaluate(tiny, EvalConfig(device="cuda:99"))
    with pytest.raises(ValueError, match="device 'gpu' is not usable here"):
        evaluate(tiny, EvalConfig(device="gpu"))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", None, "tiny has no tokenizer that loads without its own code .*; copy tokenizer.json"),
        ("tokenizer.json", "{", r"tiny/tokenizer\.json is damaged: Expecting .*; download or copy it again"),
        ("tokenizer_config.json", "[]", r"tiny/tokenizer_config\.json is damaged: it holds a JSON list.*; download"),
    ],
)
def test_a_tokenizer_that_is_missing_or_damaged_is_one_line(
    tiny: Path, tmp_path: Path, file: str, text: str | None, message: str
) -> None:
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    if text is None:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        evaluate(folder, EvalConfig(tasks="none", perplexity="python"))
    assert "\n" not in str(caught.value)


def test_flatten_keeps_filters_separate() -> None:
    results = {
        "results": {"gsm8k": {"alias": "x", "sample_len": 4, "em,strict": 0.5, "em,none": 1, "em_stderr,none": "N/A"}}
    }
    assert flatten(results) == {"gsm8k/em_strict": 0.5, "gsm8k/em": 1.0}


def test_a_temporary_folder_without_room_is_named(
    tiny: Path, small_disk: Callable[..., Any], without_data: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_disk("16k") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))  # as TMPDIR sets it
        message = f"temporary files could not be written to {disk}: No space left on device .*TMPDIR can name another"
        with pytest.raises(OSError, match=message):
            evaluate(tiny, EvalConfig(tasks=("continuation",), perplexity="none"))
