"""The layer loop: read a decoder layer, prune it, write it out, pass the calibration tokens on to the next.

    slimgpt prune smollm2 out --ratio 0.25 --num-samples 32 --seq-len 1024        (about 2 minutes on 2 CPU cores)

Order inside a layer (one forward pass and two Gram matrices): attention up to o_proj -> H -> heads go -> the pruned
o_proj is applied to the head outputs already at hand -> gate and up -> H -> channels go -> the pruned down_proj is
applied to the activations at hand.

Shapes: N = sequences, B = sequences in a block, T = tokens, D = hidden size, A = heads * head_dim, F = FFN width,
K = kept columns.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from math import inf
from pathlib import Path

import torch
import transformers
from torch import Tensor

from slimgpt.checkpoints.families import LayerShape
from slimgpt.checkpoints.pruned_form import pruned_config
from slimgpt.config import PruneConfig
from slimgpt.data.calibration import Calibration
from slimgpt.engine.activations import Blocks, choose_place, make_blocks
from slimgpt.engine.decisions import Kept, agree, all_heads, choose_channels, choose_heads, sliced
from slimgpt.engine.job import Job
from slimgpt.engine.layer_pass import Frame, LayerPass
from slimgpt.engine.output_folder import FinishedLayer, OutputFolder
from slimgpt.engine.ranks import Ranks
from slimgpt.files import locked
from slimgpt.method import obs
from slimgpt.method.schedule import Budget
from slimgpt.report import LayerReport, PruneReport
from slimgpt.usage import Clock, device_name, peak_memory


def prune(
    model: str | Path,
    out: str | Path,
    config: PruneConfig,
    *,
    calibration: Calibration | None = None,
    on_layer: Callable[[LayerReport, int], None] | None = None,
) -> PruneReport:
    """Prune the model in folder ``model`` into the new folder ``out``, never holding more than one decoder layer.

    A run that was interrupted goes on where it stopped when it is started again with the same arguments; the result is
    the same, bit for bit. Called by every process of an initialised ``torch.distributed`` group (on GPUs after
    ``torch.cuda.set_device``), it shares the calibration sequences out among them; the first process writes.

    Args:
        model: dense (or already pruned) checkpoint with safetensors.
        out: where the pruned checkpoint goes.
        config: what is asked.
        calibration: token ids to use instead of those that ``config.calibration`` names.
        on_layer: called after each layer, on every process, with its report and the number of layers.

    Raises:
        ValueError: for a model or a config that cannot be pruned, before long work; NaN in a layer, with its name.
        FileExistsError: when ``out`` holds something else, or a run that differs; the message names what differs.
        BlockingIOError: when another process writes to ``out``.
        ConnectionError: when another process of the group is gone.
        OSError: when the disk is too small.
    """
    ranks, out = Ranks(), Path(out)
    with ranks.together():
        job = Job(Path(model), config)
    folder: OutputFolder | None = None  # the first rank's alone
    with ExitStack() as held, torch.inference_mode():

        def begin() -> tuple[Calibration, PruneReport | None]:
            nonlocal folder
            job.check_space(out)
            looked_at = calibration or job.calibration()
            if len(looked_at.ids_NT) < ranks.count:
                raise ValueError(
                    f"{len(looked_at.ids_NT)} calibration sequences cannot be shared out among {ranks.count} "
                    f"processes; ask for at least {ranks.count} (num_samples), or start fewer processes"
                )
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out))
            folder = OutputFolder(out, job, looked_at, ranks.count)
            return looked_at, folder.report() if folder.finished else None

        calibration, report = ranks.from_first(begin)
        return report or _Loop(job, calibration, out, folder, ranks).run(on_layer)


class _Loop:
    def __init__(self, job: Job, calibration: Calibration, out: Path, folder: OutputFolder | None, ranks: Ranks):
        self.job, self.config, self.family, self.ranks = job, job.config, job.family, ranks
        self.calibration, self.out, self._folder = calibration, out, folder
        self.device, self.dtype = job.device, job.dtype
        self.budget = Budget(job.config)
        # What a parameter costs in the FFN of the layer before, whose output adds to the same residual stream: heads
        # that cost more stay. Nothing is known before the first FFN, so its layer keeps its heads.
        self.price = 0.0 if job.config.head_budget == "price" and job.config.targets == "all" else inf
        self.clock = Clock(self.device)

    @property
    def folder(self) -> OutputFolder:
        """OUT, which only the first rank reads and writes."""
        assert self._folder is not None, "only the first rank has it"
        return self._folder

    def run(self, on_layer: Callable[[LayerReport, int], None] | None) -> PruneReport:
        start = time.perf_counter()
        job, n = self.job, len(self.job.shapes)
        self.replayed = self.ranks.from_first(lambda: self.folder.finished_layers)
        with self.ranks.together():
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.frame = Frame(job.model_config, job.shards, self.family, self.device, self.dtype)
            with self.clock("forward"):
                self._embed()
        reports = []
        for i in range(n):
            report = self._layer(i)
            reports.append(report)
            with self.ranks.together():
                if on_layer is not None:
                    on_layer(report, n)
        usage = self.ranks.gather((peak_memory(self.device), self.clock.seconds()))
        return self.ranks.from_first(lambda: self._publish(reports, time.perf_counter() - start, usage))

    def _embed(self) -> None:
        """Make room for this rank's activations, and fill it with what the first layer reads."""
        job, T = self.job, self.config.seq_len
        ids_NT = self.ranks.share(self.calibration.ids_NT)
        size = min(len(ids_NT), max(1, self.config.block_tokens // T))
        self.place = choose_place(self.config.activations, self.device, job.cost(processes=self.ranks.count).device)
        widest = max(max(shape.hidden_size, shape.num_heads * shape.head_dim) for shape in job.shapes)

        def room(width: int) -> Blocks:
            block_bytes = size * ids_NT.shape[1] * width * self.dtype.itemsize
            return make_blocks(self.place, -(-len(ids_NT) // size), block_bytes, self.device, self.out)

        if self.place == "disk":
            self.out.mkdir(parents=True, exist_ok=True)  # other machines may have no such folder yet
        self.stream_BTD, self.inner_BT = room(job.shapes[0].hidden_size), room(widest)
        if self.place == "disk" and self.ranks.first:
            job.check_space(self.out)  # again: what activations took is no longer free
        for b, x_BTD in enumerate(self.frame.embed(ids_NT, size)):
            self.stream_BTD[b] = x_BTD

    def _layer(self, i: int) -> LayerReport:
        """Prune layer ``i``, or replay what an earlier run decided: the same arithmetic either way.

        ``inner_BT`` holds each block's head outputs, later what attention adds to the residual stream.
        """
        start = time.perf_counter()
        shape, ratio, replay = self.job.shapes[i], self.job.ratios[i], i < self.replayed
        with self.ranks.together():
            with self.clock("read"):
                dense = self.job.layer_tensors(i)
                layer_pass = self.frame.layer(i, dense)
                done = self.folder.finished_layer(i) if replay and self.ranks.first else None
            gram, price = None if replay else self._attention_gram(i, shape, ratio), self.price
            for b, x_BTD in enumerate(self.stream_BTD):
                with self.clock("forward"):
                    x_BTA = self.inner_BT[b] = layer_pass.head_outputs(x_BTD)
                if gram is not None:
                    with self.clock("gram"):
                        gram.add(x_BTA)
                    if b == 0 and self.family.attention_norm:  # the price is one in the residual stream, past the norm
                        some_BTD = layer_pass.linear(self.family.output)(x_BTA)
                        price /= layer_pass.norm_gain(self.family.attention_norm, some_BTD)
        if gram is not None:
            with self.clock("gram"):
                self.ranks.add(gram.H_DD)
        attention = agree(self.ranks, self.device, lambda: self._attention(dense, shape, ratio, gram, done, price))
        heads = shape.heads
        removed = heads.parameters - heads.cost(len(attention.heads), len(attention.kv_heads))
        width = self.budget.ffn_width(
            ratio, shape.parameters, removed, shape.channel_parameters, shape.intermediate_size
        )
        ffn = self._ffn(i, dense, layer_pass, attention, shape, width, done, replay)

        def finish() -> LayerReport:
            if done is not None:
                return done.report
            after = replace(
                shape, num_heads=len(attention.heads), num_kv_heads=len(attention.kv_heads), intermediate_size=width
            )
            report = LayerReport(
                layer=i,
                num_attention_heads=after.num_heads,
                num_key_value_heads=after.num_kv_heads,
                intermediate_size=width,
                dense_num_attention_heads=shape.num_heads,
                dense_num_key_value_heads=shape.num_kv_heads,
                dense_intermediate_size=shape.intermediate_size,
                kept_heads=attention.heads,
                kept_kv_heads=attention.kv_heads,
                kept_channels=ffn.columns_K.tolist(),
                attention_error=attention.error,
                ffn_error=ffn.error,
                attention_damping=attention.damping,
                ffn_damping=ffn.damping,
                ffn_price=ffn.marginal_error / shape.channel_parameters,
                ratio=1 - after.parameters / shape.parameters,
                seconds=time.perf_counter() - start,
            )
            with self.clock("write"):
                self.folder.finish_layer(i, sliced(dense, self.family, shape, attention, ffn), report)
            return report

        report = self.ranks.from_first(finish)
        if self.price < inf and report.ffn_price > 0:
            self.price = report.ffn_price
        self.frame.release(i)
        return report

    def _attention_gram(self, i: int, shape: LayerShape, ratio: float) -> obs.Gram | None:
        """An empty H for ``o_proj``; None where all heads stay whatever it would say."""
        layout = shape.heads
        budget = self.budget.heads(ratio, layout.parameters, shape.parameters)
        if budget < layout.smallest_unit(self.config.head_unit, self.config.head_multiple):
            return None
        if self.price <= 0 and self._needed(shape, ratio) <= 0:
            return None
        return obs.Gram(layout.num_heads * layout.head_dim, self.device, f"layer {i}, {self.family.output}")

    def _needed(self, shape: LayerShape, ratio: float) -> float:
        """Parameters that heads must give up whatever they cost."""
        return self.budget.forced(ratio, shape.parameters, shape.channel_parameters, shape.intermediate_size)

    def _attention(
        self,
        dense: dict[str, Tensor],
        shape: LayerShape,
        ratio: float,
        gram: obs.Gram | None,
        done: FinishedLayer | None,
        price: float,
    ) -> Kept:
        """Choose the heads that stay and refit ``o_proj``, or take both from an earlier run."""
        layout, name = shape.heads, f"{self.family.output}.weight"
        weight_DA = dense[name]
        if done is not None:
            columns_K = layout.columns(done.report.kept_heads)
            return Kept(done.report.kept_heads, done.report.kept_kv_heads, columns_K, done.tensors[name])
        if gram is None:
            return all_heads(weight_DA, layout)
        with self.clock("select"):
            return choose_heads(
                weight_DA,
                gram,
                layout,
                self.config,
                budget=self.budget.heads(ratio, layout.parameters, shape.parameters),
                price=price,
                needed=self._needed(shape, ratio),
            )

    def _ffn(
        self,
        i: int,
        dense: dict[str, Tensor],
        layer_pass: LayerPass,
        attention: Kept,
        shape: LayerShape,
        width: int,
        done: FinishedLayer | None,
        replay: bool,
    ) -> Kept:
        """Choose the channels that stay, refit ``down_proj`` and move every block past the layer."""
        name, full, keeps = f"{self.family.down}.weight", shape.intermediate_size, self.job.setting().keeps(shape)
        apply_attention = attention.applied(layer_pass.linear(self.family.output), self.device, self.dtype)
        activations_BTF: list[Tensor] = []
        gram = None
        if not replay and width < full:
            gram = obs.Gram(full, self.device, f"layer {i}, {self.family.down}")
            with self.ranks.together():
                for b, (x_BTD, x_BTA) in enumerate(zip(self.stream_BTD, self.inner_BT, strict=True)):
                    with self.clock("forward"):
                        a_BTD = self.inner_BT[b] = apply_attention(x_BTA)
                        x_BTF = layer_pass.channel_activations(x_BTD, a_BTD)
                    with self.clock("gram"):
                        gram.add(x_BTF)
                    if keeps:
                        activations_BTF.append(x_BTF)
            with self.clock("gram"):
                self.ranks.add(gram.H_DD)

        def decide() -> Kept:
            if done is not None:
                return Kept([], [], torch.tensor(done.report.kept_channels), done.tensors[name])
            if gram is None:
                return Kept([], [], torch.arange(full), dense[name])
            with self.clock("select"):
                return choose_channels(dense[name], gram, full - width, self.config)

        kept = agree(self.ranks, self.device, decide)
        with self.ranks.together(), self.clock("forward"):
            if not keeps:  # what was not kept is computed again, for the channels that stay
                layer_pass.narrow(kept.columns_K.to(self.device))
            down = layer_pass.linear(self.family.down)
            apply_down = kept.applied(down, self.device, self.dtype, narrow=not keeps)
            finite = []
            for b, (x_BTD, x_BT) in enumerate(zip(self.stream_BTD, self.inner_BT, strict=True)):
                a_BTD = x_BT if gram is not None else apply_attention(x_BT)
                x_BTF = activations_BTF[b] if activations_BTF else layer_pass.channel_activations(x_BTD, a_BTD)
                mlp_BTD = apply_down(x_BTF)
                if b == 0:
                    gain = layer_pass.norm_gain(self.family.mlp_norm, mlp_BTD)
                out_BTD = self.stream_BTD[b] = layer_pass.output(x_BTD, a_BTD, mlp_BTD)
                finite.append(out_BTD.isfinite().all())
            if not bool(torch.stack(finite).all()):
                raise ValueError(f"layer {i} gives NaN or infinite values in {self.dtype}; try --dtype float32")
        return replace(kept, marginal_error=kept.marginal_error * gain)

    def _publish(
        self, layers: list[LayerReport], seconds: float, usage: list[tuple[int, dict[str, float]]]
    ) -> PruneReport:
        """Turn OUT into a model. ``usage`` holds peak memory and seconds by phase of each rank."""
        job, shapes = self.job, [layer.shape_of(shape) for layer, shape in zip(layers, self.job.shapes, strict=True)]
        with self.clock("write"):
            self.folder.finish_rest()
        usage = [(peak_memory(self.device), self.clock.seconds()), *usage[1:]]
        before, after = job.parameters(job.shapes), job.parameters(shapes)
        projections = sum(shape.parameters for shape in job.shapes)
        phases = {name: max(of_rank.get(name, 0.0) for _, of_rank in usage) for name in usage[0][1]}
        report = PruneReport(
            base_model=job.base_model,
            model_type=job.model_config.model_type,
            config=self.config.to_dict(),
            calibration=self.calibration.facts,
            layers=layers,
            ratio=(before - after) / projections,
            model_ratio=(before - after) / before,
            parameters_before=before,
            parameters_after=after,
            bytes_before=job.shards.bytes,
            bytes_after=self.folder.bytes,
            seconds=seconds,
            peak_memory_bytes=max(peak for peak, _ in usage),
            device=device_name(self.device),
            ranks=self.ranks.count,
            activations=self.place,
            replayed_layers=self.replayed,
            seconds_by_phase=phases,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
        )
        self.folder.publish(pruned_config(job.model_config, self.family, shapes), report)
        return report
