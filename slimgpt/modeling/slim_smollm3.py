"""SmolLM3 whose decoder layers differ in width; see per_layer.py."""

from transformers import SmolLM3Config, SmolLM3ForCausalLM, SmolLM3Model
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimSmolLM3Config(SmolLM3Config):
    model_type = "slim_smollm3"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class SlimSmolLM3Model(SlimModel, SmolLM3Model):
    config: SlimSmolLM3Config
    layer_class = SmolLM3DecoderLayer


class SlimSmolLM3ForCausalLM(SlimForCausalLM, SmolLM3ForCausalLM):
    config: SlimSmolLM3Config
    model_class = SlimSmolLM3Model
