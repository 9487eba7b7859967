"""Data of the tasks as a folder of one's own has it."""

import json
from pathlib import Path

import pytest

from slimgpt.evaluation.harness_tasks import LOCAL_TASKS

# One or two rows of each data set, in the fields of their Hugging Face versions.
ROWS = {
    "boolq": {"question": "is it", "passage": "Title -- It is.", "idx": 0, "label": 1},
    "piqa": {"goal": "Open a jar", "sol1": "twist", "sol2": "sing", "label": 0},
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "A man bakes.",
        "ctx_b": "he",
        "ctx": "A man bakes. he",
        "endings": ["eats.", "[title] flies.", "sinks.", "sings."],
        "label": "0",
        "split": "val",
    },
    "winogrande": {"sentence": "Ann met Bea and _ left.", "option1": "Ann", "option2": "Bea", "answer": "2"},
    "arc_easy": {
        "id": "a",
        "question": "Why?",
        "choices": {"text": ["so", "no"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "openbookqa": {
        "id": "a",
        "question_stem": "The sun",
        "choices": {"text": ["shines", "rains"], "label": ["A", "B"]},
        "answerKey": " A",
    },
    "wikitext": {"page": " \n = Title = \n \n A line of text . \n"},
}
ROWS["arc_challenge"] = ROWS["arc_easy"]


@pytest.fixture
def local_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    for name, task in LOCAL_TASKS.items():
        (folder / task.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / task.path).write_text((json.dumps(ROWS[name]) + "\n") * 2)
    monkeypatch.setenv("SLIMGPT_DATA", str(folder))
    return folder
