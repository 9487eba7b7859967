"""OLMo-2 whose decoder layers differ in width; see per_layer.py."""

from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer

from .per_layer import SlimForCausalLM, SlimModel


class SlimOlmo2Config(Olmo2Config):
    model_type = "slim_olmo2"
    # The model-wide widths are read only by code that sizes buffers (vLLM, generate()); layers never read them.
    allow_global_per_layer_attribute_access = True


class SlimOlmo2Model(SlimModel, Olmo2Model):
    config: SlimOlmo2Config
    layer_class = Olmo2DecoderLayer


class SlimOlmo2ForCausalLM(SlimForCausalLM, Olmo2ForCausalLM):
    config: SlimOlmo2Config
    model_class = SlimOlmo2Model
