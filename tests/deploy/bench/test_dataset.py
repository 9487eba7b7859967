"""Prompts of a file: what is refused before anything starts, and what vLLM is told."""

import json

import pytest

from deploy.bench.config import BenchConfig
from deploy.bench.dataset import check_dataset, longest_prompt, serve_arguments
from tests.tiny_models import write_dense

TALK = '{"conversations": [{"from": "human", "value": "Say more of it."}, {"from": "gpt", "value": "So."}]}'
TALK_OF_ROLES = f"[{TALK}]".replace("from", "role").replace("value", "content")
PROMPTS = ["One.", "One, and one more.", "Two."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def test_prompts_longer_than_the_model_reads_are_refused(model, prompts):
    config = BenchConfig(dataset_name="custom", dataset_path=str(prompts), output_len=8)
    longest = longest_prompt(model, prompts)
    check_dataset(model, config, longest + 8)
    check_dataset(model, config, 0)
    with pytest.raises(ValueError, match=f"prompts.jsonl have up to {longest} tokens, with output_len 8 more than the"):
        check_dataset(model, config, longest + 7)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ', "line 2 is not JSON"),
        ("b.jsonl", '{"text": "x"}\n', "line 1 has no field 'prompt' that is a string"),
        ("c.jsonl", "", "holds no prompt"),
        ("d.json", "{", "is not JSON"),
        ("e.json", '[{"conversations": [{"value": "only one turn"}]}]', "holds no conversations of two turns"),
        ("f.json", '{"conversations": 3}', "holds no conversations of two turns"),
        ("h.json", f"[{TALK}, null]", "entry 2 is not an object with a list 'conversations'"),
        ("i.json", f'[{TALK}, {{"conversations": null}}]', "entry 2 is not an object with a list 'conversations'"),
        ("j.json", TALK_OF_ROLES, "entry 1 has a turn without a text 'value'; ShareGPT's turns have from and value"),
        ("k.json", f"[{TALK}]".replace("Say more of it.", "x"), "has no first turn of 4 to 1024 tokens"),
        ("l.json", f"[{TALK}]".replace("more", "more " * 1024), "has no first turn of 4 to 1024 tokens"),
        ("m.jsonl", '{"prompt": "x"}\n{"prompt": ""}\n', "line 2 holds an empty prompt"),
        ("n.jsonl", '{"prompt": "2024"}\n{"prompt": "1.5"}\n', "are all numbers, which vLLM takes for no text"),
        ("g.jsonl", None, "does not exist; name a file that does"),
    ],
)
def test_files_that_vllm_would_fail_on_are_refused(model, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    kind = "custom" if name.endswith("jsonl") else "sharegpt"
    config = BenchConfig(dataset_name=kind, dataset_path=str(tmp_path / name))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_dataset(model, config, 4096)


def test_what_vllm_takes_of_conversations_passes(model, tmp_path):
    one = '{"conversations": [{"from": "human", "value": "only one turn"}]}'
    (tmp_path / "talks.json").write_text(f'[{one}, {TALK}, {{"id": 3}}]')
    check_dataset(model, BenchConfig(dataset_name="sharegpt", dataset_path=str(tmp_path / "talks.json")), 4096)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset_name": "sharegpt"}, "the latter must name its file"),
        ({"dataset_path": "a.json"}, "the latter must be empty, or dataset_name another one"),
        ({"dataset_name": "custom", "dataset_path": "a.json"}, "custom prompts from a .jsonl file alone"),
    ],
)
def test_name_and_path_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**fields)


def test_a_users_prompts_are_sent_as_they_are(prompts):
    arguments = serve_arguments(BenchConfig(dataset_name="custom", dataset_path=str(prompts), output_len=8))
    assert arguments == [
        *("--dataset-name", "custom", "--dataset-path", str(prompts)),
        *("--custom-output-len", "8", "--skip-chat-template"),
    ]
