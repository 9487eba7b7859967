"""One forward and one backward pass over the dense model, layer by layer: second moments of inputs and gradients.

Forward, each layer's input is kept. At the end the loss is the sum over positions of ``-log p(y)``, y drawn from the
model's own distribution. Backward, layers come last to first: one is read, its forward pass made again, the gradient
of its output sent through it. So no more than one layer is held, and both H and G of its two pruned maps are at hand at
the same moment.

Shapes: N = sequences, B = sequences in a block, T = tokens, D = hidden size, V = vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimgpt.checkpoints.output_head import OutputHead
from slimgpt.engine.activations import Blocks, make_blocks
from slimgpt.engine.cost import LOGIT_TOKENS
from slimgpt.engine.job import Job
from slimgpt.engine.layer_pass import Frame, LayerPass
from slimgpt.engine.overlap import read_ahead
from slimgpt.engine.ranks import Ranks
from slimgpt.method import obs

MOST_ENERGY = 30.0  # of a token's gradient, in medians


@dataclass(frozen=True)
class MapMoments:
    """Sums over tokens for one pruned map: H of its inputs, G of the gradients by its outputs, ``bounded``."""

    inputs: obs.Gram
    gradients: obs.Gram


def bounded(g_TD: Tensor) -> Tensor:
    """Scale down the gradients ``[..., D]`` whose energy ``|g|^2`` is above MOST_ENERGY times the median of all tokens.

    H and G are averages of their own, so a price takes inputs and gradients to be independent. They are not where a
    norm lies behind the map (Gemma): it multiplies the gradient of a token whose output is next to nothing. BOS, where
    the FFN gives nothing, had 60,000 medians: three of it and two more among 1,536 tokens made 97 % of a layer's G,
    and its price 34 times what the removal cost (benchmarks/RESULTS.md).
    """
    energy_T1 = g_TD.float().square().sum(dim=-1, keepdim=True)
    limit = MOST_ENERGY * energy_T1.median()
    scale_T1 = torch.where((energy_T1 > limit) & (limit > 0), (limit / energy_T1).sqrt(), 1.0)
    return g_TD * scale_T1.to(g_TD.dtype)


@dataclass(frozen=True)
class LayerMoments:
    """Those of ``o_proj`` and ``down_proj`` of one layer, and its weights, names relative to the layer."""

    layer: int
    tensors: dict[str, Tensor]
    attention: MapMoments
    ffn: MapMoments


class Head:
    """Final norm and output head."""

    def __init__(self, job: Job):
        prefix = job.family.layers.rsplit(".", 1)[0]
        tied = job.model_config.tie_word_embeddings
        source = f"{prefix}.embed_tokens.weight" if tied else "lm_head.weight"
        weights = job.shards.load([f"{prefix}.norm.weight", source], job.device)
        self.output = OutputHead(job.model_config, weights[source].to(job.dtype))
        self.norm = self.output.norm
        self.norm.weight = nn.Parameter(weights[f"{prefix}.norm.weight"].to(job.dtype), requires_grad=False)

    def logits(self, x_TD: Tensor) -> Tensor:
        """In float32 ``[T, V]``."""
        return self.output.logits(self.norm(x_TD))

    def gradient(self, x_BTD: Tensor, generator: torch.Generator) -> Tensor:
        """Of ``-sum log p(y)`` by the hidden states, y drawn from p."""
        gradients = []
        for x_TD in x_BTD.flatten(0, 1).split(LOGIT_TOKENS):
            with torch.enable_grad():
                x_TD = x_TD.detach().requires_grad_()
                logits_TV = self.logits(x_TD)
            # the softmax is needed to draw; p - onehot(y) is the gradient, so autograd need not make another
            p_TV = logits_TV.detach().softmax(dim=1)
            p_TV[torch.arange(len(p_TV), device=p_TV.device), _drawn(p_TV, generator)] -= 1
            gradients += torch.autograd.grad(logits_TV, x_TD, p_TV)
        return torch.cat(gradients).view_as(x_BTD)


def _drawn(p_TV: Tensor, generator: torch.Generator) -> Tensor:
    """A word for each token from its distribution: where the cumulated probabilities pass a random number ``[T]``."""
    cumulated_TV = p_TV.cumsum(dim=1)
    random_T1 = torch.rand(len(p_TV), 1, generator=generator, device=p_TV.device)
    drawn_T1 = torch.searchsorted(cumulated_TV, random_T1 * cumulated_TV[:, -1:])
    return drawn_T1.squeeze(1).clamp_(max=p_TV.shape[1] - 1)  # a rounded sum may lie behind the last word


@contextmanager
def _autograd_possible() -> Iterator[None]:
    """Leave inference mode, whose tensors autograd cannot use; nothing is recorded yet."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Curvature:
    """The two passes over this rank's share of the sequences.

    Args:
        job: the model.
        ids_NT: the calibration tokens.
        ranks: the processes that share them; sums are over all.
        folder: where layers' inputs go, if they wait on disk.
    """

    def __init__(self, job: Job, ids_NT: Tensor, ranks: Ranks, folder: Path):
        self.job, self.ranks, self.ids_NT = job, ranks, ranks.share(ids_NT)
        self.place = job.place(ranks.count)
        self.folder = folder
        self.size = min(len(self.ids_NT), max(1, job.config.block_tokens // ids_NT.shape[1]))

    def layers(self) -> Iterator[LayerMoments]:
        """Both moments of every layer, last to first."""
        job, ranks = self.job, self.ranks
        with ranks.together(), _autograd_possible():
            self.frame = Frame(job.model_config, job.shards, job.family, job.device, job.dtype)
            inputs_BTD, gradient_BTD = self._forward()
        last_first = range(len(job.shapes))[::-1]
        coming = read_ahead(job.layer_tensors, last_first, job.device)
        for i in last_first:
            with ranks.together(), _autograd_possible():
                moments = self._backward(i, next(coming), inputs_BTD.pop(), gradient_BTD)
            for part in (moments.attention, moments.ffn):
                for gram in (part.inputs, part.gradients):
                    ranks.add(gram.H_DD)
            yield moments
            self.frame.release(i)

    def _room(self) -> Blocks:
        ids_NT, job = self.ids_NT, self.job
        block_bytes = self.size * ids_NT.shape[1] * job.shapes[0].hidden_size * job.dtype.itemsize
        return make_blocks(self.place, -(-len(ids_NT) // self.size), block_bytes, job.device, self.folder)

    def _forward(self) -> tuple[list[Blocks], Blocks]:
        """The input of every layer, and the gradient by the last one's output."""
        job, frame = self.job, self.frame
        stream = self._room()
        for b, x_BTD in enumerate(frame.embed(self.ids_NT, self.size)):
            stream[b] = x_BTD
        inputs = [stream]
        for i, tensors in enumerate(read_ahead(job.layer_tensors, range(len(job.shapes)), job.device)):
            layer, after = frame.layer(i, tensors), self._room()
            for b, x_BTD in enumerate(inputs[-1]):
                after[b] = layer.entire(x_BTD)
            frame.release(i)
            inputs.append(after)
        head, generator = Head(job), torch.Generator(job.device).manual_seed(job.config.seed + self.ranks.index)
        gradient = inputs.pop()
        for b, x_BTD in enumerate(gradient):
            gradient[b] = head.gradient(x_BTD, generator)
        return inputs, gradient

    def _backward(self, i: int, tensors: dict[str, Tensor], inputs: Blocks, gradient: Blocks) -> LayerMoments:
        """One layer's moments; ``gradient`` becomes that by its input."""
        job, family = self.job, self.job.family
        layer = self.frame.layer(i, tensors)
        layer.layer.requires_grad_(False)
        A, F = job.shapes[i].num_heads * job.shapes[i].head_dim, job.shapes[i].intermediate_size

        def moments(name: str, columns: int) -> MapMoments:
            rows = job.shapes[i].hidden_size
            named = f"layer {i}, {name}"
            return MapMoments(
                obs.Gram(columns, job.device, named), obs.Gram(rows, job.device, f"{named}, its gradients")
            )

        attention, ffn = moments(family.output, A), moments(family.down, F)
        for b, (x_BTD, g_BTD) in enumerate(zip(inputs, gradient, strict=True)):
            gradient[b] = _back(layer, x_BTD, g_BTD, {family.output: attention, family.down: ffn})
        return LayerMoments(i, tensors, attention, ffn)


def _back(layer: LayerPass, x_BTD: Tensor, g_BTD: Tensor, maps: dict[str, MapMoments]) -> Tensor:
    """Add one block to the moments; returns the gradient by the layer's input."""
    outputs: list[Tensor] = []

    def remember(moments: MapMoments) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
            moments.inputs.add(given[0].detach())
            outputs.append(out)

        return hook

    hooks = [layer.linear(name).register_forward_hook(remember(moments)) for name, moments in maps.items()]
    with torch.enable_grad():
        x_BTD = x_BTD.detach().requires_grad_()
        out_BTD = layer.entire(x_BTD)
    for hook in hooks:
        hook.remove()
    *of_outputs, of_input = torch.autograd.grad(out_BTD, [*outputs, x_BTD], g_BTD)
    for moments, of_output in zip(maps.values(), of_outputs, strict=True):
        moments.gradients.add(bounded(of_output))
    return of_input
