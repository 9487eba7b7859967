"""Pruned checkpoints for vLLM: decoder layers that differ in heads, kv heads and FFN width.

Families whose vLLM layer takes a config of its own get a native class here. The others are built from our transformers
classes by vLLM's Transformers backend. Only vLLM imports this module, by the names that vllm_plugin registers.
"""

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.utils import extract_layer_index


class _OwnConfig:
    """Comes before vLLM's decoder layer among the bases, and hands it the layer's own config."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        config: Any = vllm_config.model_config.hf_config.per_layer_config[extract_layer_index(prefix)]
        super().__init__(vllm_config, prefix, config=config, **kwargs)  # type: ignore[call-arg]


class SlimLlamaDecoderLayer(_OwnConfig, LlamaDecoderLayer): ...


class SlimMistralDecoderLayer(_OwnConfig, MistralDecoderLayer): ...


class SlimLlamaForCausalLM(LlamaForCausalLM):
    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = SlimLlamaDecoderLayer
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)


class SlimPhi3ForCausalLM(SlimLlamaForCausalLM):
    packed_modules_mapping = Phi3ForCausalLM.packed_modules_mapping


class SlimMistralForCausalLM(MistralForCausalLM):
    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = SlimMistralDecoderLayer
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
