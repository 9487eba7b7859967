"""Evaluation: perplexity and lm-eval's tasks on one model that is loaded once.

The figures of dense and pruned models belong together: same config, data, machine and backend (transformers).
"""

import glob
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from slimgpt.checkpoints.headers import raw_config
from slimgpt.checkpoints.loading import load_causal_lm
from slimgpt.checkpoints.origins import read_config
from slimgpt.config import EvalConfig
from slimgpt.data.bos import Bos, resolve_bos
from slimgpt.data.calibration import load_tokenizer
from slimgpt.data.text import TextSource, local_data, perplexity_text
from slimgpt.device import compute_dtype, dtype_name, resolve_device
from slimgpt.equal_bits import settle_vector_functions
from slimgpt.evaluation.harness_tasks import LOCAL_TASKS, DataUsed, choose_tasks, load_tasks
from slimgpt.evaluation.perplexity import PerplexityResult, check_length, perplexity, text_blocks
from slimgpt.files import scratch

# Facts about the machine and its folders that lm-eval puts beside the figures.
PRIVATE = ("pretty_env_info", "git_hash", "upper_git_hash", "model_source", "samples", "eval_time")


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The figures of one model.

    Args:
        model: the folder's name.
        metrics: flat, e.g. "wikitext2/perplexity", "hellaswag/acc_norm", "hellaswag/acc_norm_stderr".
        perplexity: in full, or None where it was not requested.
        results: lm-eval's own JSON without facts about the machine; {} where no task was requested.
        texts: the data behind the figures.
        config: the EvalConfig's fields, with the tasks, the place of BOS and the dtype that "auto" became.
        device: the kind of device, e.g. "cpu" or "cuda".
        dtype: the model's dtype, e.g. "float32".
        seconds: the entire evaluation, loading included.
        versions: of torch, transformers and lm_eval.
        digest: of the checkpoint, where the caller knows it (slimgpt.checkpoints.lineage).
    """

    model: str
    metrics: dict[str, float]
    perplexity: PerplexityResult | None
    results: dict[str, Any]
    texts: tuple[DataUsed, ...]
    config: dict[str, Any]
    device: str
    dtype: str
    seconds: float
    versions: dict[str, str]
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "EvalResult":
        """The inverse of ``to_dict``."""
        return cls(
            **fields
            | {
                "perplexity": PerplexityResult(**fields["perplexity"]) if fields["perplexity"] else None,
                "texts": tuple(DataUsed(**data) for data in fields["texts"]),
            }
        )


def evaluate(
    model_folder: str | Path,
    config: EvalConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    on_progress: Callable[[str], None] | None = None,
) -> EvalResult:
    """Measure one model. Tasks and texts are found before the model is loaded, so that a wrong name costs seconds.

    Args:
        model_folder: the checkpoint; with ``model`` and ``tokenizer`` given, only its name is used.
        config: what is measured.
        model: a loaded transformers causal LM, measured on its own device and in its own dtype.
        tokenizer: its tokenizer.
        on_progress: called with one line for each step and each perplexity block.

    Raises:
        ValueError, FileNotFoundError: an unknown task, data that cannot be had, a folder without a model, a device that
            this machine lacks, or what ``perplexity`` refuses.
        ModuleNotFoundError: tasks are requested and lm-eval is not installed.
    """
    start, config, say = time.perf_counter(), config or EvalConfig(), on_progress or (lambda _: None)
    folder = Path(model_folder)
    if model is None or tokenizer is None:
        raw_config(folder)  # raises where the folder holds no model
    device = resolve_device(config.device)
    settle_vector_functions()
    names = choose_tasks(config.tasks)
    text = None if config.perplexity == "none" else perplexity_text(config.perplexity)
    with scratch("slimgpt-eval-") as place:  # definitions and converted data while tasks run
        tasks, used = load_tasks(names, place, config.num_fewshot) if names else ({}, ())
        model_config = read_config(folder) if model is None else model.config
        tokenizer = tokenizer or load_tokenizer(folder)
        if tasks:
            check_for_tasks(tokenizer, folder, chat_template=config.apply_chat_template)
        bos, blocks = resolve_bos(config.bos, tokenizer, model_config.model_type), []
        if text:
            check_length(config.seq_len, model_config)
            blocks = text_blocks(
                text,
                tokenizer,
                model_config.vocab_size,
                seq_len=config.seq_len,
                max_blocks=config.max_blocks or None,
                bos=bos,
            )
        if model is None:
            say(f"loading {folder.name}")
            dtype = compute_dtype(config.dtype, device, model_config.dtype)
            model = load_causal_lm(folder, dtype, model_config).to(device)
        measured = _perplexity(model, tokenizer, text, blocks, config, bos, say) if text else None
        results = _run_tasks(model, tokenizer, tasks, config, bos, folder.name, place, say) if tasks else {}
    metrics = {_name(f"{measured.text}/perplexity"): measured.perplexity} if measured else {}
    if measured and measured.stderr is not None:
        metrics[_name(f"{measured.text}/perplexity_stderr")] = measured.stderr
    texts = (DataUsed(name=text.name, origin=text.origin, sha256=text.sha256),) if text else ()
    return EvalResult(
        model=folder.name,
        metrics=metrics | flatten(results),
        perplexity=measured,
        results=results,
        texts=(*texts, *used),
        config=asdict(config) | {"tasks": list(names), "bos": bos, "dtype": dtype_name(model.dtype)},
        device=model.device.type,
        dtype=dtype_name(model.dtype),
        seconds=time.perf_counter() - start,
        versions={
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **({"lm_eval": version("lm_eval")} if tasks else {}),
        },
    )


def check_for_tasks(tokenizer: Any, folder: Path, *, chat_template: bool) -> None:
    """Raise ValueError where the tokenizer lacks what lm-eval's tasks need: BOS or EOS, and the template if wanted."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"{folder}: its tokenizer has neither BOS nor EOS, with one of which lm-eval begins prompts; name its "
            "eos_token in tokenizer_config.json, or measure perplexity alone (tasks none)"
        )
    if chat_template and not tokenizer.chat_template:
        raise ValueError(f"{folder} has no chat template: leave apply_chat_template out, or add one to its tokenizer")


def flatten(results: dict[str, Any]) -> dict[str, float]:
    """lm-eval's results as flat metrics: ``results["piqa"]["acc,none"]`` becomes "piqa/acc"; "N/A" is left out.

    Of a group with figures of its own, such as mmlu, its 57 tasks are left out, too: a mean would count them once each.
    """
    by_task = {task: dict(_figures(figures)) for task, figures in results.get("results", {}).items()}
    groups = results.get("group_subtasks", {})
    inside = {task for group, tasks in groups.items() if by_task.get(group) for task in tasks}
    return {
        _name(f"{task}/{k}"): v for task, figures in by_task.items() if task not in inside for k, v in figures.items()
    }


def _figures(figures: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in figures.items():
        metric, _, filtered = key.partition(",")
        if filtered and isinstance(value, int | float) and math.isfinite(value):
            yield metric if filtered == "none" else f"{metric}_{filtered}", float(value)


def _name(metric: str) -> str:
    """Metric names keep to what MLflow accepts."""
    return re.sub(r"[^\w.\-/ ]", "_", metric)


def _perplexity(
    model: Any,
    tokenizer: Any,
    text: TextSource,
    blocks: list[list[int]],
    config: EvalConfig,
    bos: Bos,
    say: Callable[[str], None],
) -> PerplexityResult:
    return perplexity(
        model,
        tokenizer,
        text,
        seq_len=config.seq_len,
        max_blocks=config.max_blocks or None,
        batch_size=1,  # a block's logits alone are seq_len * vocabulary floats
        bos=bos,
        blocks=blocks,
        on_progress=lambda done, count: say(f"perplexity on {text.name}: block {done} of {count}"),
    )


def _run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: dict[str, Any],
    config: EvalConfig,
    bos: Bos,
    name: str,
    place: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    import lm_eval  # seconds to import, and optional
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, hash_string

    from slimgpt.evaluation.answer_logits import AnswerLogits

    say(f"tasks: {', '.join(tasks)}")
    lm = AnswerLogits(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        device=str(model.device),
        softmax_dtype="float32",  # else sums over an answer's tokens are rounded to the 8 bits of a bfloat16 model
        add_bos_token=bos != "none",  # said explicitly: a tokenizer that was saved again may have lost its own flag
    )
    # Samples are requested to make lm-eval's task hashes, which prove that two runs saw the same documents and prompts.
    with _no_git_hash():
        raw = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks.values()),
            limit=config.limit or None,
            num_fewshot=None if config.num_fewshot < 0 else config.num_fewshot,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.apply_chat_template,
            batch_size=config.batch_size,
            log_samples=True,
            task_manager=TaskManager(include_defaults=False),  # the tasks are loaded; its own are 13,000 files to read
        )
    raw["task_hashes"] = {
        task: hash_string("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows))
        for task, rows in raw["samples"].items()
    }
    for private in PRIVATE:
        raw.pop(private, None)
    raw["config"] |= {"model": name, "add_bos_token": bos != "none"}
    raw["model_name"] = raw["model_name_sanitized"] = name
    for task, definition in raw["configs"].items():
        if definition.get("dataset_path") == "json" and task in LOCAL_TASKS:
            definition["dataset_kwargs"].pop("cache_dir")
            definition["metadata"]["config_source"] = f"lm_eval/tasks/{LOCAL_TASKS[task].definition}"
    folders = [str(place), str(Path(lm_eval.__file__).parents[1]), *([str(data)] if (data := local_data()) else [])]
    folders += [glob.escape(folder) for folder in folders]  # as data files are named
    return _without_folders(json.loads(json.dumps(raw, default=handle_non_serializable)), folders)  # type: ignore[no-any-return]


@contextmanager
def _no_git_hash() -> Iterator[None]:
    """lm-eval asks git about the current folder, whose "fatal: not a git repository" would reach the user."""
    from lm_eval import evaluator
    from lm_eval.loggers.utils import get_git_commit_hash

    evaluator.get_git_commit_hash = str
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = get_git_commit_hash  # not what was there: another thread may have been quicker


def _without_folders(value: Any, folders: list[str]) -> Any:
    """The same value, where files inside these folders are named relative to them, in every string."""
    if isinstance(value, dict):
        return {key: _without_folders(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner, folders) for inner in value]
    if isinstance(value, str):
        for folder in folders:
            value = value.replace(folder + os.sep, "")
    return value
