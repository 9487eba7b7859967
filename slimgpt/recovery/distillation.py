"""The loss of a pruned model against its teacher: KL of their next-word distributions at every position.

The logits of all positions are never held, nor is what autograd would keep of them: the head is frozen, so the gradient
by the hidden states is made together with the loss, a part of the tokens at a time, and waits for the backward pass.

Shapes: B = sequences, T = tokens, D = hidden size, V = vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from slimgpt.checkpoints.output_head import OutputHead


class _PartwiseKL(torch.autograd.Function):
    """Sum over tokens of KL(teacher || student), and its gradient by the student's hidden states."""

    @staticmethod
    def forward(
        ctx: Any, student_TD: Tensor, teacher_TE: Tensor, student_head: OutputHead, teacher_head: OutputHead
    ) -> Tensor:
        total = torch.zeros((), device=student_TD.device)
        gradients: list[Tensor] = []
        part = student_head.tokens_at_once(student_TD.device)
        for x_TD, t_TE in zip(student_TD.split(part), teacher_TE.split(part), strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                x_TD = x_TD.detach().requires_grad_(ctx.needs_input_grad[0])
                logits_TV = student_head.logits(x_TD)
            log_p_TV = teacher_head.logits(t_TE).log_softmax(dim=1)
            log_q_TV = logits_TV.detach().log_softmax(dim=1)
            p_TV = log_p_TV.exp()
            total += torch.dot(p_TV.view(-1), log_p_TV.sub_(log_q_TV).view(-1))
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(logits_TV, x_TD, log_q_TV.exp_().sub_(p_TV))
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_TD,) = ctx.saved_tensors
        return gradient_TD * given[0], None, None, None


def mean_kl(student_BTD: Tensor, teacher_BTE: Tensor, student_head: OutputHead, teacher_head: OutputHead) -> Tensor:
    """KL(teacher || student) in nats per token, over all positions.

    Args:
        student_BTD: hidden states behind the final norm.
        teacher_BTE: the teacher's, whose width may be another.
        student_head: frozen.
        teacher_head: frozen, of the same vocabulary.
    """
    tokens = student_BTD.shape[0] * student_BTD.shape[1]
    total: Tensor = _PartwiseKL.apply(student_BTD.flatten(0, 1), teacher_BTE.flatten(0, 1), student_head, teacher_head)
    return total / tokens
