"""Where a model family keeps what is pruned. A new family is an entry in FAMILIES, a file in modeling/ and a test."""

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from .selection import HeadLayout


@dataclass(frozen=True)
class Family:
    """The names of one family's parts, as its checkpoints and transformers spell them.

    Attributes:
        model_type: ``config.model_type`` of the dense model.
        slim: module in slimgpt/modeling/ that defines the pruned form; also the name of the file a checkpoint carries.
        config_class, model_class, causal_lm_class: its classes.
        stock_class: the dense architecture, written where all layers come out equal.
    """

    model_type: str
    slim: str
    config_class: str
    model_class: str
    causal_lm_class: str
    stock_class: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    @property
    def slim_type(self) -> str:
        """``model_type`` of the pruned form."""
        return self.slim


FAMILIES = (
    Family(
        model_type="llama",
        slim="slim_llama",
        config_class="SlimLlamaConfig",
        model_class="SlimLlamaModel",
        causal_lm_class="SlimLlamaForCausalLM",
        stock_class="LlamaForCausalLM",
    ),
)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a dense or already pruned model.

    Raises:
        ValueError: for an unsupported architecture, with the supported ones; for a quantised checkpoint.
    """
    name = config.model_type
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the model is quantised ({config.quantization_config.get('quant_method', 'unknown method')}); "
            "prune the full-precision model it was made from, then quantise the result"
        )
    for family in FAMILIES:
        if name in (family.model_type, family.slim_type):
            return family
    supported = ", ".join(family.model_type for family in FAMILIES)
    raise ValueError(f"architecture {name!r} is not supported; supported: {supported}")


@dataclass(frozen=True)
class LayerShape:
    """The widths of one decoder layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    @property
    def heads(self) -> HeadLayout:
        """How its heads are laid out."""
        return HeadLayout(self.num_heads, self.num_kv_heads, self.head_dim, self.hidden_size)

    @property
    def channel_parameters(self) -> int:
        """Weights of one FFN channel in gate, up and down."""
        return 3 * self.hidden_size

    @property
    def parameters(self) -> int:
        """Weights of the seven projections."""
        return self.heads.parameters + self.channel_parameters * self.intermediate_size

    @property
    def overrides(self) -> dict[str, int]:
        """As an entry of ``config.per_layer_config``."""
        return {
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }


def layer_shapes(config: PretrainedConfig) -> list[LayerShape]:
    """The widths of every decoder layer of a dense or pruned model."""

    def shape(layer: Any) -> LayerShape:
        heads = layer.num_attention_heads
        return LayerShape(
            hidden_size=config.hidden_size,
            num_heads=heads,
            num_kv_heads=layer.num_key_value_heads or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate_size=layer.intermediate_size,
        )

    return [shape(layer) for layer in config.per_layer_config]
