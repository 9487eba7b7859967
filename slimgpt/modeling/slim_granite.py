"""Granite whose decoder layers differ in width; see per_layer.py."""

from transformers import GraniteConfig, GraniteForCausalLM, GraniteModel
from transformers.models.granite.modeling_granite import GraniteDecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimGraniteConfig(GraniteConfig):
    model_type = "slim_granite"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True

    @property
    def logit_scale(self):
        return 1 / self.logits_scaling  # vLLM's Transformers backend knows the scale under this name only


class SlimGraniteModel(SlimModel, GraniteModel):
    config: SlimGraniteConfig
    layer_class = GraniteDecoderLayer


class SlimGraniteForCausalLM(SlimForCausalLM, GraniteForCausalLM):
    config: SlimGraniteConfig
    model_class = SlimGraniteModel
