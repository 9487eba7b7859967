"""Gemma 2 whose decoder layers differ in width; see per_layer.py."""

from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimGemma2Config(Gemma2Config):
    model_type = "slim_gemma2"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class SlimGemma2Model(SlimModel, Gemma2Model):
    config: SlimGemma2Config
    layer_class = Gemma2DecoderLayer
    _supports_sdpa = False  # torch's sdpa leaves out the soft cap on attention scores


class SlimGemma2ForCausalLM(SlimForCausalLM, Gemma2ForCausalLM):
    config: SlimGemma2Config
    model_class = SlimGemma2Model
    _supports_sdpa = False  # torch's sdpa leaves out the soft cap on attention scores
