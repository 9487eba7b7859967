"""LLaMA whose decoder layers differ in width. This file is the whole definition of the checkpoint format.

It needs nothing but transformers, and every pruned checkpoint carries a copy of it, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` works where slimgpt is not installed.
Widths come from ``config.per_layer_config[i]``: num_attention_heads, num_key_value_heads, intermediate_size.
"""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer


class SlimLlamaConfig(LlamaConfig):
    model_type = "slim_llama"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class _OwnConfigPerLayer:
    """Each layer holds a config of its own, so a change of the attention kernel must reach all of them."""

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, LlamaAttention):
                module.config._attn_implementation = self.config._attn_implementation


class SlimLlamaModel(_OwnConfigPerLayer, LlamaModel):
    config: SlimLlamaConfig

    def __init__(self, config: SlimLlamaConfig):
        # The parent builds equal layers: give it none to build, then build them layer by layer.
        num_hidden_layers = config.num_hidden_layers
        config.num_hidden_layers = 0
        super().__init__(config)
        config.num_hidden_layers = num_hidden_layers
        self.layers = nn.ModuleList(LlamaDecoderLayer(config.per_layer_config[i], i) for i in range(num_hidden_layers))
        self.post_init()


class SlimLlamaForCausalLM(_OwnConfigPerLayer, LlamaForCausalLM):
    config: SlimLlamaConfig

    def __init__(self, config: SlimLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = SlimLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
