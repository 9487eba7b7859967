"""Qwen2 and Qwen2.5 whose decoder layers differ in width; see per_layer.py."""

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimQwen2Config(Qwen2Config):
    model_type = "slim_qwen2"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class SlimQwen2Model(SlimModel, Qwen2Model):
    config: SlimQwen2Config
    layer_class = Qwen2DecoderLayer


class SlimQwen2ForCausalLM(SlimForCausalLM, Qwen2ForCausalLM):
    config: SlimQwen2Config
    model_class = SlimQwen2Model
