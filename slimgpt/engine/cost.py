"""What pruning takes, counted from widths alone: operations, bytes, peak memory, disk.

``slimgpt prune --dry-run`` and docs/scale.md say what this says. Sizes are bytes; an operation is one multiplication or
one addition. What a layer does is in walk.py, what an elimination does in obs.py.

Letters: n = tokens of one process, b = of a block, D = hidden size, A = heads * head_dim, F = FFN width.
"""

import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

from slimgpt.engine.activations import Place
from slimgpt.method.obs import SOLVE_DTYPE, strip_width
from slimgpt.method.shapes import LayerShape

IMPORTS = 600 << 20  # resident memory of a process that has touched no model yet
CUDA_HOST = 2 << 30  # the same with CUDA's libraries and its context
SOLVE_ITEM = SOLVE_DTYPE.itemsize
LOGIT_TOKENS = 1024  # whose logits are held at once where prices are made
# That prices are made from: SmolLM2's are as good from 11 for each FFN channel as from 21 (benchmarks/RESULTS.md).
PRICE_TOKENS_PER_CHANNEL = 11
PRICE_TOKENS = 1 << 16  # at most: every layer's input of them waits for the backward pass, 17 GB of a 7B shape


def price_samples(widest_ffn: int, samples: int, seq_len: int, processes: int = 1) -> int:
    """Sequences that prices are taken from: enough for the widest FFN, one of each process at least."""
    tokens = min(PRICE_TOKENS, PRICE_TOKENS_PER_CHANNEL * widest_ffn)
    return min(samples, max(processes, -(-tokens // seq_len)))


@dataclass(frozen=True)
class Setting:
    """How a model is pruned, as far as its cost goes.

    Attributes:
        samples, seq_len: calibration sequences of all processes, and their length.
        block_tokens: tokens that pass a layer at once.
        item: bytes of a number in the forward passes.
        stored: bytes of a stored weight of a layer.
        keep: bytes at most for one layer's channel activations of all tokens.
        cpu: whether device memory is host memory.
        place: where activations wait between layers: device, host or disk.
        processes: each with a device and a share of the sequences of its own.
        price_samples: sequences that a forward and a backward pass take prices from first; 0: there are none.
    """

    samples: int
    seq_len: int
    block_tokens: int
    item: int
    stored: int
    keep: int
    cpu: bool
    place: Place = "device"
    processes: int = 1
    price_samples: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the process that has most of them."""
        return -(-self.samples // self.processes) * self.seq_len

    @property
    def block(self) -> int:
        """Tokens of one block: whole sequences."""
        return min(self.tokens, max(1, self.block_tokens // self.seq_len) * self.seq_len)

    def keeps(self, shape: LayerShape) -> bool:
        """Whether one layer's channel activations stay in memory until its channels are chosen."""
        return self.tokens * shape.intermediate_size * self.item <= self.keep


@dataclass(frozen=True)
class Cost:
    """What the slowest process does, and what the one that needs most memory holds.

    Attributes:
        forward, gram, solve: operations, in the forward dtype, in float32 and in SOLVE_DTYPE.
        moved: bytes of activations that come from and go to where they wait, if that is not the device.
        reduced: bytes of H that are summed over the processes.
        read, written: bytes of weights.
        device, host: bytes of peak memory; on a CPU both are the same memory, and ``device`` is 0.
        disk: bytes of the pruned weights, and of activations that wait in a file.
    """

    forward: float
    gram: float
    solve: float
    moved: float
    reduced: float
    read: float
    written: float
    device: int
    host: int
    disk: int

    @property
    def memory(self) -> int:
        """Peak memory where the run computes."""
        return self.device or self.host


def estimate(
    dense: list[LayerShape],
    pruned: list[LayerShape],
    setting: Setting,
    *,
    embedding: int,
    embedding_bytes: int,
    weight_bytes: int,
) -> Cost:
    """The cost of pruning a model of these layers.

    Args:
        dense: layers as they are.
        pruned: layers as they will be.
        setting: tokens, dtypes, place.
        embedding: parameters of the token embedding.
        embedding_bytes: of it, as stored.
        weight_bytes: of the whole pruned model, as stored.
    """
    s, pairs = setting, list(zip(dense, pruned, strict=True))
    width = max(shape.num_heads * shape.head_dim for shape in dense)
    waiting = s.tokens * (dense[0].hidden_size + max(dense[0].hidden_size, width)) * s.item
    work = max(_layer_memory(shape, after, s) for shape, after in pairs)
    work = max(work, embedding * s.item)
    layer = max(shape.parameters for shape in dense)
    # as stored, and the pruned copy on its way into a file; at the end the embedding takes that way
    # beside a GPU the next one is read, and the last one written, while a layer is at work
    stored = max((2 if s.cpu else 4) * layer * s.stored, 2 * embedding_bytes)
    if s.price_samples:  # with the roots of its maps' curvatures, in float32
        stored += (1 if s.cpu else 2) * 8 * dense[0].hidden_size ** 2
    copy = 0 if s.cpu and s.item == s.stored else layer * s.item
    streams = 0
    if s.price_samples:  # every layer's input waits until the backward pass comes to it
        few = replace(s, samples=s.price_samples)
        streams = few.tokens * dense[0].hidden_size * s.item * (len(dense) + 1)
        work = max(
            work, _head_memory(dense[0].hidden_size, embedding, few), *(_price_memory(shape, few) for shape in dense)
        )
    held = max(waiting, streams)
    away = held if s.place != "device" else 0
    # blocks that wait elsewhere come and go, no more than three at a time
    passing = min(waiting, 3 * s.block * waiting // s.tokens) if away else held
    priced = _price_work(dense, s, embedding)
    if s.cpu:
        device, host = 0, IMPORTS + stored + copy + work + passing
    else:
        device, host = copy + work + passing, CUDA_HOST + stored + (away if s.place == "host" else 0)
    return Cost(
        forward=sum(_forward(shape, after, s) for shape, after in pairs) + priced.forward,
        gram=s.tokens * sum(gram_operations(A) + gram_operations(F) for A, F in map(_columns, dense)) + priced.gram,
        solve=sum(_solve(shape, after) for shape, after in pairs) + priced.solve,
        moved=4 * (len(dense) * waiting + streams) if away else 0,
        reduced=sum(4 * (a**2 + f**2) for a, f in map(_columns, dense)) if s.processes > 1 else 0,
        read=2 * s.stored * sum(shape.parameters for shape in dense),  # once for the checksum of the whole model
        written=weight_bytes,
        device=device,
        host=host,
        disk=weight_bytes + (s.processes * held if s.place == "disk" else 0),
    )


def _columns(shape: LayerShape) -> tuple[int, int]:
    """Columns of the two maps that are pruned."""
    return shape.num_heads * shape.head_dim, shape.intermediate_size


def _forward(dense: LayerShape, pruned: LayerShape, s: Setting) -> float:
    """One pass of a layer, both pruned maps at their pruned width; causal attention sees half the square."""
    (A, F), (a_kept, f_kept), D = _columns(dense), _columns(pruned), dense.hidden_size
    kv = dense.num_kv_heads * dense.head_dim
    weights = D * (A + 2 * kv + a_kept) + D * (2 * F + f_kept)
    again = 0 if s.keeps(dense) else 2 * D * F
    return 2.0 * s.tokens * (weights + again + s.seq_len * A)


def gram_operations(columns: int) -> float:
    """Operations per token for the strips of the upper triangle."""
    return columns * (columns + strip_width(columns))


def _solve(dense: LayerShape, pruned: LayerShape) -> float:
    """Inverse, elimination and refit of both maps, and the scores of all heads at each step."""
    (A, F), (a_kept, f_kept), D = _columns(dense), _columns(pruned), dense.hidden_size
    steps = (A - a_kept) / dense.head_dim
    scores = steps * dense.num_heads * dense.head_dim**2 * (A - a_kept + D)
    return _eliminate(D, A, a_kept) + _eliminate(D, F, f_kept) + scores


def _eliminate(D: int, columns: int, kept: int) -> float:
    gone = columns - kept
    if not gone:
        return 0.0
    return columns**3 + gone**2 * columns + 2 * D * (gone * columns + columns**2 + 2 * kept**2) + kept**3 / 3


class _Work(NamedTuple):
    """Operations, as of a Cost."""

    forward: float
    gram: float
    solve: float


def _price_work(dense: list[LayerShape], s: Setting, embedding: int) -> _Work:
    """Each layer forward twice and backward once, the head once each; moments of inputs and gradients; eliminations."""
    if not s.price_samples:
        return _Work(0.0, 0.0, 0.0)
    s = replace(s, samples=s.price_samples)
    one_way = replace(s, keep=sys.maxsize)  # nothing is computed again within a layer
    forward = 3 * sum(_forward(shape, shape, one_way) for shape in dense) + 3 * 2.0 * s.tokens * embedding
    columns = [(*_columns(shape), shape.hidden_size) for shape in dense]
    gram = s.tokens * sum(gram_operations(A) + gram_operations(F) + 2 * gram_operations(D) for A, F, D in columns)
    solve = sum(_eliminate(D, A, 0) + _eliminate(D, F, 0) for A, F, D in columns)
    return _Work(forward, gram, solve)


def _head_memory(D: int, embedding: int, s: Setting) -> int:
    """The output head, and one part's logits: as they come, in float32, as probabilities, cumulated."""
    return embedding * s.item + min(LOGIT_TOKENS, s.block) * embedding // D * (s.item + 3 * 4)


def _price_memory(dense: LayerShape, s: Setting) -> int:
    """The most that one layer holds on the way back: what autograd keeps of a block, moments, an elimination."""
    (A, F), D, b = _columns(dense), dense.hidden_size, s.block
    kv = dense.num_kv_heads * dense.head_dim
    graph = b * s.item * (8 * D + 4 * A + 4 * kv + 5 * F)
    moments = 4 * (A**2 + F**2 + 2 * D**2)
    eliminate = SOLVE_ITEM * (3 * F**2 + 3 * D * F) + 4 * (A**2 + D**2)
    return max(moments + graph, eliminate)


def _layer_memory(dense: LayerShape, pruned: LayerShape, s: Setting) -> int:
    """The most that one layer holds beside its weights and the activations that wait."""
    (A, F), f_kept, D, n, b = _columns(dense), pruned.intermediate_size, dense.hidden_size, s.tokens, s.block
    kv = dense.num_kv_heads * dense.head_dim
    kept = n * F * s.item if s.keeps(dense) else 0
    attention = b * s.item * (2 * D + 3 * A + 4 * kv) + 4 * A**2
    as_float = 4 * b * F if s.cpu and s.item < 4 else 0  # H is summed in float32
    channels = 4 * F**2 + b * s.item * (3 * D + 3 * F) + as_float
    # H, its factor, and the part of the factor that torch copies to solve for all strips but the first
    invert = SOLVE_ITEM * (2 * F**2 + (F - strip_width(F)) ** 2 + D * F)
    eliminate = SOLVE_ITEM * (2 * F**2 + (F - f_kept) * F + 2 * D * F)
    factor = SOLVE_ITEM * (F**2 + 2 * f_kept**2 + D * F)
    refit = SOLVE_ITEM * (F**2 + f_kept**2 + D * (2 * F + 3 * f_kept))
    return max(attention, kept + max(channels, invert, eliminate, factor, refit) if f_kept < F else channels)
