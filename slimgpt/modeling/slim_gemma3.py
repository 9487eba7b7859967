"""Gemma 3 (text) whose decoder layers differ in width; see per_layer.py."""

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimGemma3Config(Gemma3TextConfig):
    model_type = "slim_gemma3"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class SlimGemma3Model(SlimModel, Gemma3TextModel):
    config: SlimGemma3Config
    layer_class = Gemma3DecoderLayer


class SlimGemma3ForCausalLM(SlimForCausalLM, Gemma3ForCausalLM):
    config: SlimGemma3Config
    model_class = SlimGemma3Model
