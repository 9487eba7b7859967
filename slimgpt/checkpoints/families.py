"""Where a model family keeps what is pruned. A new family is an entry in FAMILIES, a file in modeling/ and a test."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from transformers import PretrainedConfig

from slimgpt.method.shapes import LayerShape, Unit

_SEPARATE: Mapping[str, tuple[Unit, ...]] = MappingProxyType(
    {
        "self_attn.q_proj": ("query",),
        "self_attn.k_proj": ("kv",),
        "self_attn.v_proj": ("kv",),
        "mlp.gate_proj": ("channel",),
        "mlp.up_proj": ("channel",),
    }
)
_FUSED: Mapping[str, tuple[Unit, ...]] = MappingProxyType(
    {"self_attn.qkv_proj": ("query", "kv", "kv"), "mlp.gate_up_proj": ("channel", "channel")}
)


@dataclass(frozen=True)
class Family:
    """The names of one family's parts, as its checkpoints and transformers spell them.

    Attributes:
        model_type: ``config.model_type`` of the dense model.
        name: as in its class names: the dense model is ``{name}ForCausalLM``, the pruned one ``Slim{name}ForCausalLM``.
        slim: module in slimgpt/modeling/ that defines the pruned form, which is also its ``model_type``.
        rows: the projections whose rows go with a head, a kv head or a channel: one block of rows after the other.
        output, down: the two maps whose columns are pruned.
        attention_norm, mlp_norm: a norm between such a map and the residual stream; "" where there is none.
        prunes_heads: False where removing a head would change the heads that stay.
        has_head_dim: whether the dense config knows a ``head_dim`` apart from ``hidden_size / num_attention_heads``.
    """

    model_type: str
    name: str
    slim: str
    rows: Mapping[str, tuple[Unit, ...]] = field(default_factory=lambda: _SEPARATE)
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    output: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    attention_norm: str = ""
    mlp_norm: str = ""
    prunes_heads: bool = True
    has_head_dim: bool = False

    @property
    def stock_class(self) -> str:
        """The dense architecture, written where all layers come out equal."""
        return f"{self.name}ForCausalLM"

    def matrices(self, shape: LayerShape) -> list[tuple[int, int]]:
        """Rows and columns of a layer's projections, as they are stored: fused ones are one."""
        rows = [(sum(map(shape.width, units)), shape.hidden_size) for units in self.rows.values()]
        return [*rows, (shape.hidden_size, shape.width("query")), (shape.hidden_size, shape.width("channel"))]

    def slim_class(self, kind: Literal["Config", "Model", "ForCausalLM"]) -> str:
        """Name of a class of the pruned form."""
        return f"Slim{self.name}{kind}"


FAMILIES = (
    Family("llama", "Llama", "slim_llama", has_head_dim=True),  # and Vicuna; Baichuan-7B by origins.py
    Family("mistral", "Mistral", "slim_mistral", has_head_dim=True),
    Family("qwen2", "Qwen2", "slim_qwen2"),
    Family("qwen3", "Qwen3", "slim_qwen3", has_head_dim=True),
    Family(
        "gemma2",
        "Gemma2",
        "slim_gemma2",
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        has_head_dim=True,
    ),
    Family(
        "gemma3_text",
        "Gemma3",
        "slim_gemma3",
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        has_head_dim=True,
    ),
    Family("phi3", "Phi3", "slim_phi3", rows=_FUSED),
    Family("smollm3", "SmolLM3", "slim_smollm3"),
    Family(
        "olmo2",
        "Olmo2",
        "slim_olmo2",
        attention_norm="post_attention_layernorm",
        mlp_norm="post_feedforward_layernorm",
        prunes_heads=False,  # its q and k norms span all heads
    ),
    Family("granite", "Granite", "slim_granite"),
)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a dense or already pruned model.

    Raises:
        ValueError: for an unsupported architecture, with the supported ones; for a quantised checkpoint; for a mixture
            of experts.
    """
    name = config.model_type
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"the model is quantised ({config.quantization_config.get('quant_method', 'unknown method')}); "
            "take the full-precision model it was made from, and quantise the result"
        )
    for family in FAMILIES:
        if name in (family.model_type, family.slim):
            return family
    supported = ", ".join(family.model_type for family in FAMILIES)
    experts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if "moe" in name or any(getattr(config, attribute, None) for attribute in experts):
        raise ValueError(f"{name!r} is a mixture of experts, which is not supported; supported: {supported}")
    raise ValueError(f"architecture {name!r} is not supported; supported: {supported}")


def attention_kernel(config: PretrainedConfig) -> Literal["eager", "sdpa"]:
    """Transformers' attention kernel that computes this model as it was trained.

    torch's sdpa silently leaves out the soft cap on attention scores (Gemma 2).
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"


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


def positions(config: PretrainedConfig) -> int:
    """Tokens the model reads at once.

    Where its rotary embedding is stretched, ``max_position_embeddings`` is the length after that (LLaMA 3.1) or before
    it (Qwen2.5 with YaRN, Vicuna 16k): the length that the factor begins from tells which.
    """
    longest, rope = int(config.max_position_embeddings), getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default" or not rope.get("factor"):
        return longest
    return max(longest, int(float(rope["factor"]) * (rope.get("original_max_position_embeddings") or longest)))
