"""Qwen3 whose decoder layers differ in width; see per_layer.py."""

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimQwen3Config(Qwen3Config):
    model_type = "slim_qwen3"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class SlimQwen3Model(SlimModel, Qwen3Model):
    config: SlimQwen3Config
    layer_class = Qwen3DecoderLayer


class SlimQwen3ForCausalLM(SlimForCausalLM, Qwen3ForCausalLM):
    config: SlimQwen3Config
    model_class = SlimQwen3Model
