"""A model's output head by itself: logits of hidden states, computed by the model's own class.

Soft caps and scales are that class's business.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from slimgpt.checkpoints.building import building

LOGIT_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}  # of one model's float32 logits at once; a CPU's caches hold few


class _Given(nn.Module):
    """Stands where the decoder was: the hidden states are given."""

    def forward(self, *, inputs_embeds: Tensor, **_: Any) -> Any:
        return SimpleNamespace(
            last_hidden_state=inputs_embeds, past_key_values=None, hidden_states=None, attentions=None
        )


class OutputHead:
    """The head alone; the rest of the model has no weights.

    Args:
        config: the model's.
        weight: ``[V, D]``, shared, not trained; its dtype is that of the product.
    """

    def __init__(self, config: PretrainedConfig, weight: Tensor):
        with building, torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=weight.dtype).eval()
        self.norm: nn.Module = self._model.model.norm  # without data
        self.vocab_size = len(weight)
        self._model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
        self._model.model = _Given()

    def tokens_at_once(self, device: torch.device) -> int:
        """Of how many tokens the logits are held at once, where they are made in parts."""
        return max(1, LOGIT_BYTES[device.type] // (4 * self.vocab_size))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Of normed hidden states, in float32 ``[T, V]``."""
        given_TD = x_TD.to(self._model.lm_head.weight.dtype)
        out: Tensor = self._model(inputs_embeds=given_TD[None], use_cache=False).logits[0]
        return out.float()
