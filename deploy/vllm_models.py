"""SlimLLaMA for vLLM: LLaMA whose decoder layers differ in heads, kv heads and FFN width.

Only vLLM imports this module, through the name that ``deploy.vllm_plugin`` registers.
"""

from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index


class SlimLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        config: Any = vllm_config.model_config.hf_config.per_layer_config[extract_layer_index(prefix)]
        super().__init__(vllm_config, prefix, config=config, **kwargs)


class SlimLlamaForCausalLM(LlamaForCausalLM):
    def __init__(
        self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = SlimLlamaDecoderLayer
    ) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
