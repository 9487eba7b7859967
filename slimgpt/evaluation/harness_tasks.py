"""lm-eval tasks: the official definitions, with local data where SLIMGPT_DATA holds it, and one that needs no data.

Where data is local, a small YAML is written that includes the official one and changes nothing but the data source.
``continuation`` is made of the part of Python's own text that calibration does not see.
"""

import difflib
import glob
import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimgpt.checkpoints.hub import hub_obstacle
from slimgpt.data import python_text
from slimgpt.data.text import DATA_VARIABLE, local_data

CONTEXT_WORDS, CONTINUATION_WORDS, CHOICES = 60, 15, 4


@dataclass(frozen=True)
class LocalTask:
    """Where a task's official definition and its data are.

    Args:
        definition: the YAML inside lm_eval/tasks.
        split: the split that the official task scores.
        path: the data inside the folder that SLIMGPT_DATA names.
    """

    definition: str
    split: str
    path: str


PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
LOCAL_TASKS = {
    "boolq": LocalTask("super_glue/boolq/default.yaml", "validation", "boolq/validation.jsonl"),
    "piqa": LocalTask("piqa/piqa.yaml", "validation", "piqa/validation.jsonl"),
    "hellaswag": LocalTask("hellaswag/hellaswag.yaml", "validation", "hellaswag/validation.jsonl"),
    "winogrande": LocalTask("winogrande/default.yaml", "validation", "winogrande/validation.jsonl"),
    "arc_easy": LocalTask("arc/arc_easy.yaml", "test", "arc_easy/test.jsonl"),
    "arc_challenge": LocalTask("arc/arc_challenge.yaml", "test", "arc_challenge/test.jsonl"),
    "openbookqa": LocalTask("openbookqa/openbookqa.yaml", "test", "openbookqa/test.jsonl"),
    "wikitext": LocalTask("wikitext/wikitext.yaml", "test", "wikitext-2-raw/test.pages.jsonl"),
}
CONTINUATION = "continuation"


@dataclass(frozen=True, kw_only=True)
class DataUsed:
    """One data set that figures were measured on.

    Args:
        name: the task's or text's name.
        origin: "local data", "hub", "python" or "file".
        sha256: of the data; "" for data from the hub, whose own revision counts.
    """

    name: str
    origin: str
    sha256: str

    def to_dict(self) -> dict[str, str]:
        """The fields as JSON types."""
        return asdict(self)


def choose_tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    """Replace "auto" by what can be had: the paper's seven tasks, else the local ones of them, else continuation."""
    chosen: list[str] = []
    for name in names:
        if name == "auto":
            local = [task for task in PAPER_TASKS if _local_file(task)]
            reachable = len(local) < len(PAPER_TASKS) and not hub_obstacle()
            chosen += PAPER_TASKS if reachable else local or [CONTINUATION]
        else:
            chosen.append(name)
    return tuple(dict.fromkeys(chosen))


def load_tasks(
    names: tuple[str, ...], folder: Path, num_fewshot: int = -1
) -> tuple[dict[str, Any], tuple[DataUsed, ...]]:
    """Find the tasks and their data. Nothing of a model is needed, so this comes before one is loaded.

    Args:
        names: task names, "auto" already replaced.
        folder: an empty folder for definitions and data, which must live as long as the tasks are used.
        num_fewshot: examples that every task is to be given; -1: each its own number.

    Returns:
        the tasks and groups of tasks by name, as lm-eval's evaluator takes them, and the data they use.

    Raises:
        ValueError: a name that lm-eval does not know, or a task that takes no examples and is to be given some.
        FileNotFoundError: a task whose data is neither local nor on a reachable hub.
        ModuleNotFoundError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager  # seconds to import, and optional
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed; pip install 'slimgpt[eval]'") from error

    at_hand = {name: _write_task(name, folder) for name in (*LOCAL_TASKS, CONTINUATION) if name in names}
    used = [data for data in at_hand.values() if data]
    others = [name for name in names if not at_hand.get(name)]
    # lm-eval reads thousands of YAML files to learn its own tasks: not necessary where all requested ones are here.
    manager = TaskManager(include_path=str(folder), include_defaults=bool(others))
    for name in others:
        if name not in manager.all_tasks:
            raise ValueError(_unknown(name, manager.all_tasks))
    loaded: dict[str, Any] = manager.load([name for name in names if name not in others])["tasks"] if used else {}
    for name in others:
        reason = hub_obstacle()
        try:
            if reason and reason != "HF_HUB_OFFLINE is set":  # set: the cache is asked, without retries
                raise ConnectionError(reason)
            found = manager.load([name])
            loaded |= {name: found["groups"][name]} if name in found["groups"] else found["tasks"]
        except Exception as error:  # the hub's, datasets' and lm-eval's own errors share no class
            expected = f" as {LOCAL_TASKS[name].path}" if name in LOCAL_TASKS else ""
            why = reason or f"the hub does not give it ({str(error).splitlines()[0]})"
            raise FileNotFoundError(
                f"the data of task {name} is not available: {why}, and {DATA_VARIABLE} does not name a folder with it"
                f"{expected}; set {DATA_VARIABLE}, or use the task {CONTINUATION!r} (text that ships with Python)"
            ) from error
        used.append(DataUsed(name=name, origin="hub", sha256=""))
    # lm-eval leaves such a task as it is, and the figures would pass for those with examples.
    leaves = manager.load(list(loaded.values()))["tasks"] if num_fewshot > 0 else {}
    if fixed := [name for name, task in leaves.items() if task.get_config("num_fewshot") == 0]:
        raise ValueError(
            f"num_fewshot is {num_fewshot}, but {', '.join(fixed)} fixes it at 0: measure other tasks, or leave it out"
        )
    return loaded, tuple(used)


def _unknown(name: str, known: list[str]) -> str:
    ours = ", ".join(("auto", *LOCAL_TASKS, CONTINUATION))
    close = difflib.get_close_matches(name, [*known, *LOCAL_TASKS, CONTINUATION], n=3)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"task {name!r} is not known{meant}; choose from {ours}, or what `lm-eval ls tasks` shows"


def _local_file(name: str) -> Path | None:
    folder = local_data()
    path = folder / LOCAL_TASKS[name].path if folder else None
    return path if path and path.is_file() else None


def _write_task(name: str, folder: Path) -> DataUsed | None:
    """Write the task's definition where its data is available (JSON is YAML too)."""
    if name == CONTINUATION:
        data = folder / "continuation.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in continuation_rows()), encoding="utf-8")
        definition, split, origin = continuation_definition(), "test", "python"
    else:
        local = _local_file(name)
        if not local:
            return None
        data, split, origin = local, LOCAL_TASKS[name].split, "local data"
        definition = _local_definition(name)
    definition |= {
        "dataset_path": "json",
        "dataset_name": None,
        # datasets takes the file's name for a pattern
        "dataset_kwargs": {"data_files": {split: glob.escape(str(data))}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": "validation" if split == "validation" else None,
        "test_split": "test" if split == "test" else None,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(definition), encoding="utf-8")
    return DataUsed(name=name, origin=origin, sha256=hashlib.sha256(data.read_bytes()).hexdigest())


def _local_definition(name: str) -> dict[str, Any]:
    import lm_eval.tasks

    official = Path(lm_eval.tasks.__file__).parent / LOCAL_TASKS[name].definition
    return {"include": str(official), "task": name}


def continuation_definition() -> dict[str, Any]:
    """The lm-eval definition of ``continuation``: which of four continuations belongs to a passage."""
    mean = {"aggregation": "mean", "higher_is_better": True}
    return {
        "task": CONTINUATION,
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{continuations}}",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        "metadata": {"version": 1.0},
    }


def continuation_rows() -> list[dict[str, Any]]:
    """The documents of ``continuation``: a passage, its continuation and three from elsewhere; always the same."""
    passages: list[tuple[str, str]] = []
    for document in python_text.held_out_documents():
        words = _prose(document)
        for start in range(0, len(words) - CONTEXT_WORDS - CONTINUATION_WORDS + 1, CONTEXT_WORDS + CONTINUATION_WORDS):
            middle = start + CONTEXT_WORDS
            passages.append((" ".join(words[start:middle]), " ".join(words[middle : middle + CONTINUATION_WORDS])))
    draw = random.Random(0)
    rows = []
    for number, (passage, continuation) in enumerate(passages):
        others = draw.sample([text for i, (_, text) in enumerate(passages) if i != number], CHOICES - 1)
        label = draw.randrange(CHOICES)
        others.insert(label, continuation)
        rows.append({"passage": passage, "continuations": others, "label": label})
    draw.shuffle(rows)  # so that the first N are a sample of all documents
    return rows


def _prose(document: str) -> list[str]:
    """The words of a document's running text: paragraphs that are mostly words, without tables, code and headings."""
    words: list[str] = []
    for paragraph in document.split("\n\n"):
        all_words = paragraph.split()
        plain = [word for word in all_words if word.strip(".,;:()'\"").isalpha()]
        if len(all_words) >= 12 and len(plain) >= 0.8 * len(all_words):
            words += all_words
    return words
