"""The walk over a model's layers: read one, decide what stays of it, write it, pass the calibration tokens on.

Order inside a layer (one forward pass and two Gram matrices): attention up to o_proj -> H -> heads are removed -> the
pruned o_proj is applied to the head outputs already at hand -> gate and up -> H -> channels are removed -> the pruned
down_proj is applied to the activations at hand. A layer that an earlier run finished is passed through with the weights
of that run, by the same arithmetic.

Shapes: N = sequences, B = sequences in a block, T = tokens, D = hidden size, A = heads * head_dim, F = FFN width,
K = kept columns.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from slimgpt.data.calibration import Calibration
from slimgpt.engine.activations import Blocks, make_blocks
from slimgpt.engine.chosen import Chosen
from slimgpt.engine.decisions import (
    Kept,
    agree,
    all_channels,
    all_heads,
    choose_channels,
    choose_heads,
    report_of,
    sliced,
)
from slimgpt.engine.job import Job
from slimgpt.engine.layer_pass import Frame, Layer
from slimgpt.engine.output_folder import OutputFolder
from slimgpt.engine.overlap import WriteBehind, read_ahead
from slimgpt.engine.ranks import Ranks
from slimgpt.method import obs
from slimgpt.method.allocation import Allocation
from slimgpt.report import LayerReport
from slimgpt.usage import Clock

_Read = tuple[dict[str, Tensor], dict[str, Tensor]]  # a layer's weights; roots of its curvatures, where it is decided


class Walk:
    """One pass over all layers.

    Between two layers ``stream_BTD`` holds what the next one reads. Within a layer ``inner_BT`` holds each block's head
    outputs, and later what attention adds to the residual stream.

    Args:
        job: what is pruned, and how.
        calibration: the tokens.
        allocation: says how many units go where.
        out: where activations on disk go.
        folder: takes finished layers, and knows those of an earlier run; the first rank's alone. None on the others,
            and where nothing is written.
        ranks: the processes that share the work.
    """

    def __init__(
        self,
        job: Job,
        calibration: Calibration,
        allocation: Allocation | Chosen,
        out: Path | None,
        folder: OutputFolder | None,
        ranks: Ranks,
    ):
        self.job, self.config, self.family, self.ranks = job, job.config, job.family, ranks
        self.calibration, self.out, self.folder = calibration, out, folder
        self.device, self.dtype = job.device, job.dtype
        self.allocation = allocation
        self.clock = Clock(self.device)
        self.replayed = 0

    def layers(self, on_layer: Callable[[LayerReport, int], None] | None) -> list[LayerReport]:
        """Prune every layer, first to last, or replay what an earlier run finished; ``on_layer`` as in ``prune``."""
        job, count = self.job, len(self.job.shapes)
        self.replayed = self.ranks.from_first(lambda: self.folder.finished_layers if self.folder else 0)
        with self.ranks.together():
            self.frame = Frame(job.model_config, job.shards, self.family, self.device, self.dtype)
            with self.clock("forward"):
                self._embed()
        reports = []
        with (
            WriteBehind(job.device) as self.behind,
            closing(read_ahead(self._read, range(count), job.device)) as coming,
        ):
            for i in range(count):
                layer = self._layer(i, coming)
                report = self._replay(layer) if i < self.replayed else self._prune(layer)
                self.allocation.settle(i, report.shape_of(layer.shape), report.ffn_price)
                self.frame.release(i)
                reports.append(report)
                with self.ranks.together():
                    if on_layer is not None:
                        on_layer(report, count)
            with self.ranks.together(), self.clock("write"):
                self.behind.wait()
        return reports

    def _embed(self) -> None:
        """Make room for this rank's activations, and fill it with what the first layer reads."""
        job, T = self.job, self.config.seq_len
        ids_NT = self.ranks.share(self.calibration.ids_NT)
        size = min(len(ids_NT), max(1, self.config.block_tokens // T))
        self.place = job.place(self.ranks.count)
        self.setting = job.setting(self.place, self.ranks.count)
        widest = max(max(shape.hidden_size, shape.num_heads * shape.head_dim) for shape in job.shapes)
        folder = self.out or Path(tempfile.gettempdir())

        def room(width: int) -> Blocks:
            block_bytes = size * ids_NT.shape[1] * width * self.dtype.itemsize
            return make_blocks(self.place, -(-len(ids_NT) // size), block_bytes, self.device, folder)

        if self.place == "disk":
            folder.mkdir(parents=True, exist_ok=True)  # other machines may have no such folder yet
        self.stream_BTD, self.inner_BT = room(job.shapes[0].hidden_size), room(widest)
        if self.place == "disk" and self.folder is not None:
            job.check_space(folder)  # again: what activations took is no longer free
        for b, x_BTD in enumerate(self.frame.embed(ids_NT, size)):
            self.stream_BTD[b] = x_BTD

    def _read(self, i: int) -> _Read:
        return self.job.layer_tensors(i), self.allocation.roots(i) if self.ranks.first else {}

    def _layer(self, i: int, coming: Iterator[_Read]) -> Layer:
        started = time.perf_counter()
        with self.ranks.together(), self.clock("read"):
            tensors, roots = next(coming)
            return Layer(i, self.job.shapes[i], tensors, roots, self.frame.layer(i, tensors), started)

    def _prune(self, layer: Layer) -> LayerReport:
        """Decide what stays, pass the tokens on, write the layer."""
        attention = self._decide_attention(layer)
        width = self.allocation.ffn_width(layer.index, len(attention.heads), len(attention.kv_heads))
        if width < layer.shape.intermediate_size:
            ffn, activations_BTF = self._decide_ffn(layer, attention, width)
            gain = self._pass_on(layer, None, ffn, activations_BTF)
        else:
            ffn = all_channels(layer.tensors[f"{self.family.down}.weight"])
            gain = self._pass_on(layer, attention, ffn)
        return self.ranks.from_first(lambda: self._write(layer, attention, ffn, gain))

    def _replay(self, layer: Layer) -> LayerReport:
        """Pass the tokens through what an earlier run made of the layer."""
        with self.ranks.together(), self.clock("read"):
            done = self.folder.finished_layer(layer.index) if self.folder else None
        self._head_outputs(layer, None)

        def kept_heads() -> Kept:
            assert done is not None, "the first rank read it"
            heads, weight_DK = done.report.kept_heads, done.tensors[f"{self.family.output}.weight"]
            return Kept(heads, done.report.kept_kv_heads, layer.shape.heads.columns(heads), weight_DK)

        def kept_channels() -> Kept:
            assert done is not None, "the first rank read it"
            return Kept([], [], torch.tensor(done.report.kept_channels), done.tensors[f"{self.family.down}.weight"])

        attention, ffn = (agree(self.ranks, self.device, decide) for decide in (kept_heads, kept_channels))
        self._pass_on(layer, attention, ffn)
        return self.ranks.from_first(lambda: done.report)  # type: ignore[union-attr]  # called where it was read

    def _decide_attention(self, layer: Layer) -> Kept:
        """Choose the heads that stay and refit ``o_proj``."""
        layout, weight_DA = layer.shape.heads, layer.tensors[f"{self.family.output}.weight"]
        i, gram = layer.index, None
        if self.allocation.heads_may_go(i):
            gram = obs.Gram(layout.num_heads * layout.head_dim, self.device, f"layer {i}, {self.family.output}")
        gain = self._head_outputs(layer, gram)

        def decide() -> Kept:
            if gram is None:
                return all_heads(weight_DA, layout)
            with self.clock("select"):
                return choose_heads(
                    weight_DA,
                    gram,
                    layout,
                    self.config,
                    limit=self.allocation.head_limit(i),
                    order=self.allocation.head_order(i),
                    root_DD=layer.roots.get("attention"),
                    cut=lambda path: self.allocation.cut_heads(i, path, gain),
                )

        return agree(self.ranks, self.device, decide)

    def _head_outputs(self, layer: Layer, gram: obs.Gram | None) -> float:
        """Fill ``inner_BT`` and, where it is given, the H of ``o_proj``; returns the gain of the norm behind it."""
        gain = 1.0
        with self.ranks.together():
            for b, x_BTD in enumerate(self.stream_BTD):
                with self.clock("forward"):
                    x_BTA = self.inner_BT[b] = layer.forward.head_outputs(x_BTD)
                if gram is None:
                    continue
                with self.clock("gram"):
                    gram.add(x_BTA)
                if b == 0 and self.family.attention_norm:
                    some_BTD = layer.forward.linear(self.family.output)(x_BTA)
                    gain = layer.forward.norm_gain(self.family.attention_norm, some_BTD)
        if gram is not None:
            with self.clock("gram"):
                self.ranks.add(gram.H_DD)
        return gain

    def _decide_ffn(self, layer: Layer, attention: Kept, width: int) -> tuple[Kept, list[Tensor]]:
        """Choose the ``width`` channels that stay and refit ``down_proj``; leaves attention's output in ``inner_BT``.

        Also returns each block's channel activations, where there is room to keep them.
        """
        full, weight_DF = layer.shape.intermediate_size, layer.tensors[f"{self.family.down}.weight"]
        apply_attention = self._attention_of(layer, attention)
        keeps, activations_BTF = self.setting.keeps(layer.shape), []
        gram = obs.Gram(full, self.device, f"layer {layer.index}, {self.family.down}")
        with self.ranks.together():
            for b, (x_BTD, x_BTA) in enumerate(zip(self.stream_BTD, self.inner_BT, strict=True)):
                with self.clock("forward"):
                    a_BTD = self.inner_BT[b] = apply_attention(x_BTA)
                    x_BTF = layer.forward.channel_activations(x_BTD, a_BTD)
                with self.clock("gram"):
                    gram.add(x_BTF)
                if keeps:
                    activations_BTF.append(x_BTF)
                del x_BTF  # or the last block would be held while channels are chosen, where memory is at its peak
        with self.clock("gram"):
            self.ranks.add(gram.H_DD)

        def decide() -> Kept:
            with self.clock("select"):
                return choose_channels(weight_DF, gram, full - width, self.config, layer.roots.get("ffn"))

        return agree(self.ranks, self.device, decide), activations_BTF

    def _pass_on(
        self, layer: Layer, attention: Kept | None, ffn: Kept, activations_BTF: list[Tensor] | None = None
    ) -> float:
        """Move every block past the layer.

        Args:
            layer: the layer.
            attention: applied to the head outputs in ``inner_BT``; None where that holds attention's output already.
            ffn: applied to the channel activations.
            activations_BTF: those of the dense channels, where they were kept; else they are computed again.

        Returns:
            The gain of the norm behind ``down_proj``.

        Raises:
            ValueError: naming the layer, when its output is not finite.
        """
        forward, gain = layer.forward, 1.0
        apply_attention = self._attention_of(layer, attention) if attention else None
        with self.ranks.together(), self.clock("forward"):
            apply_down = ffn.applied(forward.linear(self.family.down), self.device, self.dtype)
            finite = []
            for b, (x_BTD, x_BT) in enumerate(zip(self.stream_BTD, self.inner_BT, strict=True)):
                a_BTD = apply_attention(x_BT) if apply_attention else x_BT
                x_BTF = activations_BTF[b] if activations_BTF else forward.channel_activations(x_BTD, a_BTD)
                mlp_BTD = apply_down(x_BTF)
                if b == 0:
                    gain = forward.norm_gain(self.family.mlp_norm, mlp_BTD)
                out_BTD = self.stream_BTD[b] = forward.output(x_BTD, a_BTD, mlp_BTD)
                finite.append(out_BTD.isfinite().all())
            if not bool(torch.stack(finite).all()):
                raise ValueError(
                    f"layer {layer.index} gives NaN or infinite values in {self.dtype}; try --dtype float32"
                )
        return gain

    def _attention_of(self, layer: Layer, attention: Kept) -> Callable[[Tensor], Tensor]:
        return attention.applied(layer.forward.linear(self.family.output), self.device, self.dtype)

    def _write(self, layer: Layer, attention: Kept, ffn: Kept, gain: float) -> LayerReport:
        """Report what was decided, and hand the pruned layer to the folder."""
        seconds = time.perf_counter() - layer.started
        report = report_of(layer.index, layer.shape, attention, ffn, gain=gain, seconds=seconds)
        if (folder := self.folder) is not None:

            def write() -> None:
                tensors = sliced(layer.tensors, self.family, layer.shape, attention, ffn)
                folder.finish_layer(layer.index, tensors, report)

            with self.clock("write"):
                self.behind(write)
        return report
