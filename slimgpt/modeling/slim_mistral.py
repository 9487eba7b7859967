"""Mistral whose decoder layers differ in width; see per_layer.py."""

from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimMistralConfig(MistralConfig):
    model_type = "slim_mistral"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class SlimMistralModel(SlimModel, MistralModel):
    config: SlimMistralConfig
    layer_class = MistralDecoderLayer


class SlimMistralForCausalLM(SlimForCausalLM, MistralForCausalLM):
    config: SlimMistralConfig
    model_class = SlimMistralModel
