"""Definitions of tasks: lm-eval's own but for where the data is from, and what there is without data."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from slimgpt.data import python_text
from slimgpt.evaluation.harness_tasks import LOCAL_TASKS, PAPER_TASKS, choose_tasks, continuation_rows, load_tasks

# Where the data is from is all that a local definition may change.
DATA_SOURCE = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "fewshot_split"}


@pytest.fixture(scope="module")
def manager() -> Iterator[TaskManager]:
    return TaskManager()


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_local_definitions_equal_the_official_ones_except_for_the_data_source(
    name: str, local_data: Path, tmp_path: Path, manager: TaskManager
) -> None:
    tasks, used = load_tasks((name,), tmp_path)
    assert [(data.name, data.origin) for data in used] == [(name, "local data")]
    ours = tasks[name].config.to_dict()
    official = manager.task_index[name].cfg  # the registered YAML, its own includes resolved
    for key in official.keys() - DATA_SOURCE - {"tag"}:
        if callable(getattr(tasks[name].config, key)):
            continue  # compared by what it makes, below
        if key == "metadata":
            assert ours[key]["version"] == official[key]["version"]
        elif key == "metric_list":
            assert [metric["metric"] for metric in ours[key]] == [metric["metric"] for metric in official[key]]
        else:
            assert ours.get(key) == official[key], key
    scored = "test" if "test" in tasks[name].dataset else "validation"
    assert scored == (official.get("test_split") or official["validation_split"])


PROMPTS = {
    "boolq": ("Title -- It is.\nQuestion: is it?\nAnswer:", ["no", "yes"], 1),
    "piqa": ("Question: Open a jar\nAnswer:", ["twist", "sing"], 0),
    "hellaswag": ("Baking: A man bakes. He", ["eats.", "flies.", "sinks.", "sings."], 0),
    "winogrande": (1, ["Ann met Bea and Ann", "Ann met Bea and Bea"], "left."),
    "arc_easy": ("Question: Why?\nAnswer:", ["so", "no"], 1),
    "arc_challenge": ("Question: Why?\nAnswer:", ["so", "no"], 1),
    "openbookqa": ("The sun", ["shines", "rains"], 0),
}


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_prompts_choices_and_targets_equal_the_official_ones(name: str, local_data: Path, tmp_path: Path) -> None:
    task = load_tasks((name,), tmp_path)[0][name]
    document = next(iter(task.eval_docs))
    text, choices, target = PROMPTS[name]
    assert task.doc_to_text(document) == text
    assert [choice.strip() for choice in task.doc_to_choice(document)] == choices
    choice = task.doc_to_target(document)
    assert (int(choice) if isinstance(target, int) else choice) == target


def test_auto_selects_the_papers_seven_tasks_when_local_data_has_them(local_data: Path) -> None:
    assert choose_tasks(("auto", "wikitext", "piqa")) == (*PAPER_TASKS, "wikitext")


def test_continuation_uses_held_out_text_and_has_one_correct_choice() -> None:
    rows = continuation_rows()
    assert rows == continuation_rows()
    assert len(rows) > 300
    held_out = " ".join(" ".join(python_text.held_out_documents()).split())
    seen_in_calibration = " ".join(" ".join(python_text.calibration_documents()).split())
    for row in rows[:50]:
        assert len(set(row["continuations"])) == 4
        # A passage may join paragraphs over a table or code between them, so one of its ends stands there as it is.
        words = row["passage"].split() + row["continuations"][row["label"]].split()
        assert " ".join(words[:8]) in held_out or " ".join(words[-8:]) in held_out
        assert row["passage"] not in seen_in_calibration
    labels = [row["label"] for row in rows]
    assert all(0.15 < labels.count(label) / len(rows) < 0.35 for label in range(4))


WITHOUT_DATA = """
from pathlib import Path
from tempfile import mkdtemp
from slimgpt.evaluation.harness_tasks import choose_tasks, load_tasks
print(choose_tasks(("auto",)))
try:
    load_tasks(("continuation", "piqa"), Path(mkdtemp()))
except FileNotFoundError as error:
    print(error)
"""


def test_without_data_or_hub_auto_is_continuation_and_named_tasks_are_errors(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "SLIMGPT_DATA"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DATA], env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    auto, error = done.stdout.splitlines()
    assert auto == "('continuation',)"
    assert error.startswith("the data of task piqa is not available: HF_HUB_OFFLINE is set")
    assert "piqa/validation.jsonl" in error
