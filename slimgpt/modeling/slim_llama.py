"""LLaMA whose decoder layers differ in width; see per_layer.py."""

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimLlamaConfig(LlamaConfig):
    model_type = "slim_llama"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class SlimLlamaModel(SlimModel, LlamaModel):
    config: SlimLlamaConfig
    layer_class = LlamaDecoderLayer


class SlimLlamaForCausalLM(SlimForCausalLM, LlamaForCausalLM):
    config: SlimLlamaConfig
    model_class = SlimLlamaModel
