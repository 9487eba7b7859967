"""What other methods remove, as zeros in a dense transformers model, and the statistics that they choose by.

A unit whose columns of ``o_proj`` or ``down_proj`` are zero adds nothing: the model computes what it would without the
unit, so quality can be measured without writing a checkpoint. Removed parameters are counted as if it were gone.

Shapes: N = sequences, B = sequences at once, T = tokens, D = hidden size, A = heads * head_dim, F = FFN width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from slimgpt.method.obs import Gram
from slimgpt.method.shapes import LayerShape

BATCH = 4  # sequences that pass a layer at once


class Removal:
    """A LLaMA-like model whose units go.

    Args:
        model: a transformers causal LM with ``model.layers``, changed in place.

    Attributes:
        shapes: of the layers as they came.
        channels, groups: what is gone of each layer, as masks ``[F]`` and ``[kv groups]``.
        added: parameters that a method put in.
    """

    def __init__(self, model: Any):
        self.model, self.layers, config = model, model.model.layers, model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = LayerShape(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            config.intermediate_size,
        )
        self.shapes = [shape] * len(self.layers)
        self.channels = [torch.zeros(shape.intermediate_size, dtype=torch.bool) for _ in self.layers]
        self.groups = [torch.zeros(shape.num_kv_heads, dtype=torch.bool) for _ in self.layers]
        self.added = 0

    @property
    def ratio(self) -> float:
        """Removed share of the decoder layers' projection parameters."""
        gone = -self.added
        for shape, channels, groups in zip(self.shapes, self.channels, self.groups, strict=True):
            gone += int(channels.sum()) * shape.channel_parameters
            gone += shape.heads.cost(int(groups.sum()) * shape.num_heads // shape.num_kv_heads, int(groups.sum()))
        return gone / sum(shape.parameters for shape in self.shapes)

    def channels_to_go(self, ratio: float, layers: int) -> int:
        """Channels that each of so many layers loses where the FFN alone carries the ratio.

        Raises:
            ValueError: where the FFN has fewer.
        """
        shape = self.shapes[0]
        count = round(ratio * len(self.shapes) * shape.parameters / (layers * shape.channel_parameters))
        if count >= shape.intermediate_size:
            raise ValueError(f"{layers} FFNs would lose {count} channels each; they have {shape.intermediate_size}")
        return count

    def columns(self, i: int, groups: Tensor) -> Tensor:
        """The columns of layer ``i``'s ``o_proj`` that belong to these kv groups, a mask ``[A]``."""
        shape = self.shapes[i]
        return groups.repeat_interleave(shape.num_heads // shape.num_kv_heads * shape.head_dim)

    def drop_channels(self, i: int, gone_F: Tensor) -> None:
        """Zero these columns of ``down_proj``; a mask, or indices."""
        self.channels[i][gone_F] = True
        self.layers[i].mlp.down_proj.weight.data[:, self.channels[i]] = 0

    def drop_groups(self, i: int, gone_G: Tensor) -> None:
        """Zero the columns of ``o_proj`` that belong to these kv groups."""
        self.groups[i][gone_G] = True
        self.layers[i].self_attn.o_proj.weight.data[:, self.columns(i, self.groups[i])] = 0

    def add_bias(self, linear: nn.Linear, bias_D: Tensor) -> None:
        """Give a map a bias, or add to the one it has."""
        if linear.bias is None:
            self.added += len(bias_D)
            linear.bias = nn.Parameter(torch.zeros_like(bias_D), requires_grad=False)
        linear.bias.data += bias_D


class Inputs:
    """Statistics of what one linear map is given.

    Attributes:
        tokens, sequences: that went by.
        sum_D, squares_D: over tokens.
        norms_D: over sequences, of each column's norm along a sequence.
        gram: of the columns; None where not asked for.
    """

    def __init__(self, dim: int, gram: bool):
        self.tokens = self.sequences = 0
        self.sum_D, self.squares_D, self.norms_D = (torch.zeros(dim, dtype=torch.float64) for _ in range(3))
        self.gram = Gram(dim, "cpu") if gram else None

    def add(self, x_BTD: Tensor) -> None:
        """Add a batch."""
        x_BTD = x_BTD.float()
        squares_BD = x_BTD.square().sum(dim=1)
        self.tokens, self.sequences = self.tokens + x_BTD.shape[0] * x_BTD.shape[1], self.sequences + len(x_BTD)
        self.sum_D += x_BTD.sum(dim=(0, 1))
        self.squares_D += squares_BD.sum(dim=0)
        self.norms_D += squares_BD.sqrt().sum(dim=0)
        if self.gram:
            self.gram.add(x_BTD)

    @property
    def mean_D(self) -> Tensor:
        """Over tokens."""
        return self.sum_D / self.tokens

    @property
    def variance_D(self) -> Tensor:
        """Over tokens."""
        return self.squares_D / self.tokens - self.mean_D.square()


class _Caught(Exception):
    """The first layer was reached; no more is needed."""


@contextmanager
def _watched(linear: nn.Linear, gram: bool) -> Iterator[Inputs]:
    seen = Inputs(linear.in_features, gram)
    hook = linear.register_forward_pre_hook(lambda _, args: seen.add(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def walk(
    model: Any,
    ids_NT: Tensor,
    visit: Callable[[int, Inputs, Inputs], bool] = lambda *_: False,
    *,
    gram: bool = False,
    compare: Callable[[int, Tensor, Tensor], None] = lambda *_: None,
) -> None:
    """Pass calibration sequences through the layers, one layer after the other.

    Args:
        model: as of Removal.
        ids_NT: the sequences.
        visit: called with each layer's number and what its ``o_proj`` and its ``down_proj`` were given; True where it
            changed the layer, whose output is then computed again for the next one.
        gram: whether ``down_proj``'s inputs have a gram.
        compare: called with a layer's number, its inputs and its outputs ``[B, T, D]``.
    """
    layers, hidden, given = model.model.layers, [], {}

    def catch(_: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        given.update(kwargs)  # positions and mask: the same for every batch of this size
        raise _Caught

    hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids_BT in ids_NT[: len(ids_NT) // BATCH * BATCH].split(BATCH):
        with suppress(_Caught):
            model.model(input_ids=ids_BT, use_cache=False)
    hook.remove()
    for i, layer in enumerate(layers):
        with _watched(layer.self_attn.o_proj, False) as heads, _watched(layer.mlp.down_proj, gram) as channels:
            after = [layer(x_BTD, **given) for x_BTD in hidden]
        for x_BTD, y_BTD in zip(hidden, after, strict=True):
            compare(i, x_BTD, y_BTD)
        hidden = [layer(x_BTD, **given) for x_BTD in hidden] if visit(i, heads, channels) else after
