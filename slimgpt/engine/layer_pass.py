"""How calibration tokens pass one decoder layer once, with a stop where each pruned map reads its input.

The layer's own forward runs three times with parts of it standing in: attention alone, up to o_proj; gate and up, up to
down_proj; the residual additions. Each projection is computed once, and norms, masks and residuals stay the model's
business, so the same code serves every family.

Shapes: B = sequences, T = tokens, D = hidden size, A = heads * head_dim, F = FFN width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from slimgpt.checkpoints.building import building
from slimgpt.checkpoints.families import Family, attention_kernel
from slimgpt.checkpoints.shards import Shards
from slimgpt.equal_bits import settle_vector_functions
from slimgpt.method.shapes import LayerShape
from slimgpt.usage import return_freed_memory


class _Stop(nn.Module):
    """Stands where a projection was: remembers its input, returns zeros of the projection's width."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x.new_zeros(1).expand(*x.shape[:-1], self.out_features)


class _Given(nn.Module):
    """Stands where attention or the MLP was: returns what has already been computed."""

    def __init__(self, result: Any):
        super().__init__()
        self.result = result

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.result


class _Recorder(nn.Module):
    """Stands where a decoder layer was: remembers how the model calls it."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden_states, self.kwargs = hidden_states, kwargs
        return hidden_states


@contextmanager
def _standing_in(layer: nn.Module, **parts: nn.Module) -> Iterator[None]:
    """Put other modules where ``parts`` names them (dots written as ``__``), and the old ones back afterwards."""
    before = {}
    for name, part in parts.items():
        path = name.replace("__", ".")
        before[path] = layer.get_submodule(path)
        layer.set_submodule(path, part)
    try:
        yield
    finally:
        for path, part in before.items():
            layer.set_submodule(path, part)


class LayerPass:
    """One decoder layer and the keyword arguments its model calls it with."""

    def __init__(self, layer: nn.Module, family: Family, kwargs: dict[int, dict[str, Any]]):
        self.layer, self.family, self._kwargs = layer, family, kwargs
        self._attention = family.attention.replace(".", "__")
        self._mlp = family.mlp.replace(".", "__")

    def linear(self, name: str) -> nn.Linear:
        """One of the layer's projections."""
        module = self.layer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def _run(self, x_BTD: Tensor, **parts: nn.Module) -> Tensor:
        with _standing_in(self.layer, **parts):
            out = self.layer(x_BTD, **self._kwargs[x_BTD.shape[0]])
        # transformers 5 layers return a tensor; indexing it would silently drop sequences
        assert isinstance(out, Tensor)
        return out

    def entire(self, x_BTD: Tensor) -> Tensor:
        """The layer's output ``[B, T, D]``, by its own forward pass."""
        return self._run(x_BTD)

    def head_outputs(self, x_BTD: Tensor) -> Tensor:
        """What ``o_proj`` reads: the concatenated head outputs ``[B, T, A]``."""
        stop = _Stop(self.linear(self.family.output).out_features)
        nothing = _Given(x_BTD.new_zeros(1).expand_as(x_BTD))
        self._run(x_BTD, **{self.family.output.replace(".", "__"): stop, self._mlp: nothing})
        return stop.seen

    def channel_activations(self, x_BTD: Tensor, attention_BTD: Tensor) -> Tensor:
        """What ``down_proj`` reads, ``act(gate) * up`` ``[B, T, F]``, given the attention block's output."""
        stop = _Stop(self.linear(self.family.down).out_features)
        self._run(x_BTD, **{self._attention: _Given((attention_BTD, None)), self.family.down.replace(".", "__"): stop})
        return stop.seen

    def norm_gain(self, name: str, y_BTD: Tensor) -> float:
        """By how much a norm between a map and the residual stream changes the energy of the map's output."""
        if not name:
            return 1.0
        before = float(y_BTD.float().square().sum())
        after = float(self.layer.get_submodule(name)(y_BTD).float().square().sum())
        return after / before if before > 0 else 1.0

    def output(self, x_BTD: Tensor, attention_BTD: Tensor, mlp_BTD: Tensor) -> Tensor:
        """The layer's output ``[B, T, D]``, given what its two blocks add."""
        return self._run(x_BTD, **{self._attention: _Given((attention_BTD, None)), self._mlp: _Given(mlp_BTD)})


@dataclass(frozen=True)
class Layer:
    """The decoder layer at work: what the walk knows of it."""

    index: int
    shape: LayerShape  # its dense widths
    tensors: dict[str, Tensor]  # its dense weights on CPU in the stored dtype, names relative to the layer
    roots: dict[str, Tensor]  # of its maps' curvatures, where errors count in nats
    forward: LayerPass
    started: float  # seconds of the clock


class Frame:
    """The model around its layers, without their weights: embeds tokens, and builds layers one at a time.

    Args:
        config: of the dense model.
        shards: its weights.
        family: its family.
        device: where to compute.
        dtype: dtype of the forward passes.
    """

    def __init__(
        self, config: PretrainedConfig, shards: Shards, family: Family, device: torch.device, dtype: torch.dtype
    ):
        self.family, self.shards, self.device, self.dtype = family, shards, device, dtype
        settle_vector_functions()  # the first of them compute the rotary embedding
        config = deepcopy(config)  # from_config writes the forward dtype into it
        config._attn_implementation = attention_kernel(config)
        with building:
            with torch.device("meta"):
                self.model = AutoModel.from_config(config, dtype=dtype).eval()
            self._compute_buffers()
        self._layers = list(self.model.layers)
        self._recorders = [_Recorder() for _ in self._layers]
        self.model.layers = nn.ModuleList(self._recorders)
        self.model.norm = nn.Identity()
        self._kwargs: list[dict[int, dict[str, Any]]] = [{} for _ in self._layers]

    def _compute_buffers(self) -> None:
        """Give values to what is computed and not stored: rotary frequencies, scales of embeddings."""
        for module in self.model.modules():
            buffers = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for name in buffers:
                setattr(module, name, torch.empty_like(module.get_buffer(name), device=self.device))
            if buffers:
                self.model._init_weights(module)  # the module's parameters stay on meta, where this does nothing

    def embed(self, ids_NT: Tensor, block: int) -> Iterator[Tensor]:
        """Hidden states before the first layer, block after block of ``block`` sequences ``[B, T, D]``.

        Also learns how the model calls each layer (masks, rotary embeddings), for each block size that occurs.
        """
        prefix = self.family.layers.rsplit(".", 1)[0]
        name = f"{prefix}.embed_tokens.weight"
        weight = self.shards.load([name], self.device)[name].to(self.dtype)
        self.model.embed_tokens.weight = nn.Parameter(weight, requires_grad=False)
        for ids_BT in ids_NT.split(block):
            self.model(input_ids=ids_BT.to(self.device), use_cache=False)
            for known, recorder in zip(self._kwargs, self._recorders, strict=True):
                known.setdefault(ids_BT.shape[0], recorder.kwargs)
            x_BTD = self._recorders[0].hidden_states
            for recorder in self._recorders:
                del recorder.hidden_states
            yield x_BTD
        self.model.embed_tokens.weight = nn.Parameter(weight.to("meta"), requires_grad=False)

    def layer(self, index: int, tensors: dict[str, Tensor]) -> LayerPass:
        """Layer ``index`` with these weights (names relative to the layer), cast to the forward dtype."""
        layer = self._layers[index]
        state = {name: t.to(self.device, non_blocking=True).to(self.dtype) for name, t in tensors.items()}
        layer.load_state_dict(state, strict=True, assign=True)
        return LayerPass(layer, self.family, self._kwargs[index])

    def release(self, index: int) -> None:
        """Free the weights of layer ``index``, and hand freed memory back to the system."""
        self._layers[index].to("meta")
        return_freed_memory()
