"""Decoder layers that differ in width, for any family: shared by the ``slim_*.py`` files beside this one.

Those files are the whole definition of the checkpoint format. They need nothing but transformers, and every pruned
checkpoint carries a copy of its own and of this one, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` works where slimgpt is not installed.
Widths come from ``config.per_layer_config[i]``: num_attention_heads, num_key_value_heads, intermediate_size.
"""

from torch import nn
from transformers import PreTrainedModel


class OwnConfigPerLayer:
    """Each layer holds a config of its own, so a change of the attention kernel must reach all of them."""

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        for layer in self.get_decoder().layers:
            for module in layer.modules():
                if hasattr(module, "config"):
                    module.config._attn_implementation = self.config._attn_implementation


class SlimModel(OwnConfigPerLayer):
    """Comes before the family's model among the bases; ``layer_class`` is the family's decoder layer."""

    layer_class: type[nn.Module]

    def __init__(self, config):
        # The parent builds equal layers: give it none to build, then build them layer by layer.
        num_hidden_layers = config.num_hidden_layers
        config.num_hidden_layers = 0
        super().__init__(config)  # type: ignore[call-arg]
        config.num_hidden_layers = num_hidden_layers
        self.layers = nn.ModuleList(self.layer_class(config.per_layer_config[i], i) for i in range(num_hidden_layers))
        self.post_init()


class SlimForCausalLM(OwnConfigPerLayer):
    """Comes before the family's causal LM among the bases; ``model_class`` is the family's ``SlimModel``."""

    model_class: type[nn.Module]

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # the parent's own would build a dense model first
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
