"""What llama.cpp calls a model: its architecture there, and the widths and numbers that the file states.

Only ``deci`` takes layers that differ in width. It is LLaMA otherwise, biases included: no norms on queries and keys,
none behind a block, no scales of its own. Models whose layers are all alike go under their family's own name.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType
from transformers import PretrainedConfig

from slimgpt.checkpoints.families import family_of, layer_shapes, positions
from slimgpt.checkpoints.gguf_file import llama3_factors
from slimgpt.method.shapes import LayerShape

_PER_LAYER = {"llama": MODEL_ARCH.DECI, "mistral": MODEL_ARCH.DECI, "qwen2": MODEL_ARCH.DECI}
_STOCK = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
# These rotate neighbours in a head; transformers, and the others there, rotate its first half with its second.
_NEIGHBOURS = (MODEL_ARCH.LLAMA, MODEL_ARCH.DECI)
_SCALINGS = {
    "default": RopeScalingType.NONE,
    "linear": RopeScalingType.LINEAR,
    "llama3": RopeScalingType.NONE,  # its factors are a tensor
}


@dataclass(frozen=True)
class Architecture:
    """A model as llama.cpp sees it.

    Attributes:
        name: of the architecture.
        config: of the model.
        shapes: of its layers.
    """

    name: MODEL_ARCH
    config: PretrainedConfig
    shapes: list[LayerShape]

    @property
    def label(self) -> str:
        """The name as files spell it."""
        return MODEL_ARCH_NAMES[self.name]

    @property
    def rotates_neighbours(self) -> bool:
        """Whether the rows of queries and keys have to change places."""
        return self.name in _NEIGHBOURS

    @property
    def context_length(self) -> int:
        """Tokens it reads: where attention slides, as many as one window holds, since llama.cpp's does not slide."""
        window = getattr(self.config, "sliding_window", None)
        return min(positions(self.config), window or positions(self.config))

    def write_numbers(self, writer: GGUFWriter) -> None:
        """Add widths, lengths and constants."""
        config, shapes = self.config, self.shapes
        rope = config.rope_parameters
        writer.add_block_count(len(shapes))
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(config.hidden_size)
        writer.add_vocab_size(config.vocab_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(shapes[0].head_dim)
        writer.add_value_length(shapes[0].head_dim)
        writer.add_rope_dimension_count(shapes[0].head_dim)
        writer.add_rope_freq_base(rope["rope_theta"])
        if (scaling := _SCALINGS[rope["rope_type"]]) != RopeScalingType.NONE:
            writer.add_rope_scaling_type(scaling)
            writer.add_rope_scaling_factor(rope["factor"])
        widths = [
            ([shape.num_heads for shape in shapes], writer.add_head_count),
            ([shape.num_kv_heads for shape in shapes], writer.add_head_count_kv),
            ([shape.intermediate_size for shape in shapes], writer.add_feed_forward_length),
        ]
        for values, add in widths:
            add(values if self.name == MODEL_ARCH.DECI else values[0])

    def rope_factors(self) -> np.ndarray | None:
        """What LLaMA 3 divides each rotation's frequency by, [head_dim / 2]; None for the others."""
        if self.config.rope_parameters["rope_type"] != "llama3":
            return None
        return llama3_factors(self.config)


def architecture_of(config: PretrainedConfig, model: Path) -> Architecture:
    """What llama.cpp has for a model.

    Args:
        config: of the model, dense or pruned.
        model: its folder, for messages.

    Raises:
        ValueError: where it has nothing that computes the same; the message says why, and what to do instead.
    """
    family, shapes = family_of(config), layer_shapes(config)
    uniform = len(set(shapes)) == 1
    known = _STOCK if uniform else _PER_LAYER
    rope = config.rope_parameters
    if family.model_type not in known:
        layers = "layers" if uniform else "layers that differ in width"
        reason = f"it is a {family.model_type}; of those with {layers}, {', '.join(known)} can"
    elif rope["rope_type"] not in _SCALINGS:
        reason = f"its rotary embedding is {rope['rope_type']}; {', '.join(_SCALINGS)} can"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        reason = f"it rotates {rope['partial_rotary_factor']:g} of each head, and llama.cpp all of it"
    elif config.hidden_act != "silu":
        reason = f"its hidden_act is {config.hidden_act}, and llama.cpp's is silu"
    else:
        return Architecture(known[family.model_type], config, shapes)
    raise ValueError(f"{model} cannot become GGUF: {reason}; serve it with vLLM instead (slimgpt serve)")
