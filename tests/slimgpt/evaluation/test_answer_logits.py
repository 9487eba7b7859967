"""Scores of answers are those of lm-eval's own model; logits are made of few positions, and of few rows at once."""

from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimgpt.evaluation import answer_logits
from slimgpt.evaluation.answer_logits import AnswerLogits
from tests.tiny_models import write_dense

VOCABULARY, LONGEST = 512, 64


def request(question: list[int], answer: list[int]) -> Any:
    return (f"{question}", f"{answer}"), question, answer


def drawn(generator: torch.Generator, shortest: int, longest: int) -> list[int]:
    count = int(torch.randint(shortest, longest + 1, (), generator=generator))
    return torch.randint(VOCABULARY, (count,), generator=generator).tolist()


@pytest.fixture(scope="module")
def requests() -> list[Any]:
    """Questions with answers of one token and of several, alone and in groups; some longer than the model reads."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(12):
        question = drawn(generator, 1, 80)
        found += [request(question, [token]) for token in drawn(generator, 1, 4)]
        found += [request(question, drawn(generator, 2, 40)) for _ in range(2)]
    return [*found, found[0]]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = write_dense(tmp_path_factory.mktemp("models") / "tiny")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=request.param)
    return loaded, AutoTokenizer.from_pretrained(folder)


def scorer(kind: type, model: tuple[Any, Any]) -> Any:
    loaded, tokenizer = model
    setting = {"batch_size": 4, "max_length": LONGEST, "device": "cpu", "softmax_dtype": "float32"}
    return kind(pretrained=loaded, tokenizer=tokenizer, **setting)


@pytest.mark.parametrize("room", [1, 1 << 20, 1 << 30], ids=["a row at a time", "some rows", "all"])
def test_scores_are_those_of_lm_eval(model, requests, room, monkeypatch):
    monkeypatch.setattr(answer_logits, "LOGITS_BYTES", room)
    expected = scorer(HFLM, model)._loglikelihood_tokens(requests, disable_tqdm=True)
    found = scorer(AnswerLogits, model)._loglikelihood_tokens(requests, disable_tqdm=True)
    near = 1e-5 if model[0].dtype == torch.float32 else 2e-2  # rows of other lengths are rounded otherwise
    for (score, greedy), (reference, likeliest) in zip(found, expected, strict=True):
        assert score == pytest.approx(reference, rel=near)
        assert greedy == likeliest or model[0].dtype != torch.float32


def test_only_as_many_logits_are_made_as_answers_need(model, monkeypatch):
    """All of a row's, ten examples before the question and 262 thousand words, are 2 GB."""
    made = []
    forward = AnswerLogits._model_call
    monkeypatch.setattr(AnswerLogits, "_model_call", lambda *given: made.append(forward(*given)) or made[-1])
    asked = [request([7] * 50, [9, 8, row]) for row in range(4)] + [request([5] * 46, [row, 1]) for row in range(4)]
    scorer(AnswerLogits, model)._loglikelihood_tokens(asked, disable_tqdm=True)
    assert [tuple(logits.shape) for logits in made] == [(4, 7, VOCABULARY), (1, 2, VOCABULARY)]
    made.clear()
    position = VOCABULARY * (model[0].dtype.itemsize + 4)
    monkeypatch.setattr(answer_logits, "LOGITS_BYTES", 2 * 2 * position)
    scorer(AnswerLogits, model)._loglikelihood_tokens(asked[4:], disable_tqdm=True)
    assert [tuple(logits.shape) for logits in made] == [(2, 2, VOCABULARY)] * 2
