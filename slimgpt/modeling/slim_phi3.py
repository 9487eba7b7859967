"""Phi-3 whose decoder layers differ in width; see per_layer.py."""

from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimPhi3Config(Phi3Config):
    model_type = "slim_phi3"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class SlimPhi3Model(SlimModel, Phi3Model):
    config: SlimPhi3Config
    layer_class = Phi3DecoderLayer


class SlimPhi3ForCausalLM(SlimForCausalLM, Phi3ForCausalLM):
    config: SlimPhi3Config
    model_class = SlimPhi3Model
