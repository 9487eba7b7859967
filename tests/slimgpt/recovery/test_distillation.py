"""The loss in parts against the whole logits in float64, value and gradient; soft caps and scales included."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slimgpt.checkpoints import output_head
from slimgpt.checkpoints.output_head import OutputHead
from slimgpt.recovery.distillation import mean_kl
from tests.tiny_families import write_family


@pytest.fixture(params=["llama3", "gemma2", "granite"])
def model(request, tmp_path):
    """A plain head, one with a soft cap, one with a scale."""
    folder = write_family(tmp_path / "model", request.param)
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)


def test_the_loss_in_parts_and_its_gradient_are_those_of_all_logits_at_once(model, monkeypatch):
    torch.manual_seed(0)
    ids_BT, noise = torch.randint(1, 500, (2, 13)), 0.3
    with torch.no_grad():
        teacher_BTD = model.model(input_ids=ids_BT).last_hidden_state
    student_BTD = (teacher_BTD + noise * torch.randn_like(teacher_BTD)).requires_grad_()
    head = OutputHead(model.config, model.get_output_embeddings().weight)
    monkeypatch.setitem(output_head.LOGIT_BYTES, "cpu", 4 * head.vocab_size * 5)  # 26 tokens in parts of 5
    loss = mean_kl(student_BTD, teacher_BTD, head, head)
    (2 * loss).backward()

    exact = model.double()
    given = student_BTD.detach().double().requires_grad_()

    def log_probabilities(hidden_BTD):
        logits = exact.lm_head(hidden_BTD)
        logits = logits / getattr(exact.config, "logits_scaling", 1.0)
        if cap := getattr(exact.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits.log_softmax(-1).flatten(0, 1)

    p, q = log_probabilities(teacher_BTD.double()), log_probabilities(given)
    expected = functional.kl_div(q, p, log_target=True, reduction="batchmean")
    (2 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) != 0
    assert torch.allclose(student_BTD.grad.double(), given.grad, rtol=1e-3, atol=1e-3 * given.grad.abs().max().item())


def test_without_a_gradient_the_value_is_the_same(model):
    hidden_BTD = torch.randn(1, 7, model.config.hidden_size)
    head = OutputHead(model.config, model.get_output_embeddings().weight)
    other_BTD = (hidden_BTD + 0.1).requires_grad_()
    with torch.no_grad():
        alone = mean_kl(other_BTD, hidden_BTD, head, head)
    assert alone.item() == mean_kl(other_BTD, hidden_BTD, head, head).item() > 0
    assert mean_kl(hidden_BTD, hidden_BTD, head, head).item() == pytest.approx(0, abs=1e-6)
