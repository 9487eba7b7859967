"""The layer loop: read a decoder layer, prune it, write it out, pass the calibration tokens on to the next.

    slimgpt prune smollm2 out --ratio 0.25 --num-samples 32 --seq-len 1024        (about 2 minutes on 2 CPU cores)

Order inside a layer (one forward pass and two Gram matrices): attention up to o_proj -> H -> heads go -> the pruned
o_proj is applied to the head outputs already at hand -> gate and up -> H -> channels go -> the pruned down_proj is
applied to the activations at hand.

Shapes: N = sequences, B = sequences in a block, T = tokens, D = hidden size, A = heads * head_dim, F = FFN width,
K = kept columns.
"""

import platform
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from . import obs, output
from .architectures import LayerShape
from .calibration import Calibration
from .checkpoint import locked
from .config import PruneConfig
from .layer_pass import Frame, LayerPass
from .plan import Job
from .report import LayerReport, PruneReport
from .schedule import Budget
from .selection import HeadLayout, remove_channels, remove_heads
from .work import FinishedLayer, Work


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
    the same, bit for bit.

    Args:
        model: dense (or already pruned) checkpoint with safetensors.
        out: where the pruned checkpoint goes.
        config: what is asked.
        calibration: token ids to use instead of those that ``config.calibration`` names.
        on_layer: called after each layer with its report and the number of layers.

    Raises:
        ValueError: for a model or a config that cannot be pruned, before long work; NaN in a layer, with its name.
        FileExistsError: when ``out`` holds something else, or a run that differs; the message names what differs.
        BlockingIOError: when another process writes to ``out``.
        OSError: when the disk is too small.
    """
    job = Job(Path(model), config)
    out = Path(out)
    job.check_space(out)
    calibration = calibration or job.calibration()
    out.mkdir(parents=True, exist_ok=True)
    with locked(out), torch.inference_mode():
        work = Work(out, job, calibration)
        if work.finished:
            return work.report()
        return _Loop(job, calibration, work).run(on_layer)


@dataclass(frozen=True)
class _Kept:
    """What stays of one map: the kept units of the layer as it came, and the refitted weight in its stored dtype."""

    heads: list[int]
    kv_heads: list[int]
    columns_K: Tensor
    weight_DK: Tensor
    error: float = 0.0
    damping: float = 0.0
    marginal_error: float = 0.0


class _Loop:
    def __init__(self, job: Job, calibration: Calibration, work: Work):
        self.job, self.config, self.family, self.work = job, job.config, job.family, work
        self.calibration = calibration
        self.device, self.dtype = job.device, job.dtype
        self.budget = Budget(job.config)
        # What a parameter costs in the FFN of the layer before, whose output adds to the same residual stream: heads
        # that cost more stay. Nothing is known before the first FFN, so its layer keeps its heads.
        self.price = 0.0 if job.config.head_budget == "price" and job.config.targets == "all" else inf
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":  # once per phase of a layer, so that kernels are not billed to the next phase
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - start

    def run(self, on_layer: Callable[[LayerReport, int], None] | None) -> PruneReport:
        start = time.perf_counter()
        job, n = self.job, len(self.job.shapes)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        block = max(1, self.config.block_tokens // self.config.seq_len)
        self.frame = Frame(job.model_config, job.shards, self.family, self.device, self.dtype)
        with self._clock("forward"):
            self.blocks_BTD = self.frame.embed(self.calibration.ids_NT, block)
        reports = []
        for i in range(n):
            report = self._layer(i)
            reports.append(report)
            if on_layer is not None:
                on_layer(report, n)
        return self._publish(reports, time.perf_counter() - start)

    def _layer(self, i: int) -> LayerReport:
        """Prune layer ``i``, or replay what an earlier run decided: the same arithmetic either way."""
        start = time.perf_counter()
        shape, ratio = self.job.shapes[i], self.job.ratios[i]
        with self._clock("read"):
            dense = self.job.layer_tensors(i)
            layer_pass = self.frame.layer(i, dense)
            done = self.work.finished_layer(i)
        with self._clock("forward"):
            heads_BTA = [layer_pass.head_outputs(x_BTD) for x_BTD in self.blocks_BTD]
        attention = self._attention(i, dense, heads_BTA, shape, ratio, done)
        heads = shape.heads
        removed = heads.parameters - heads.cost(len(attention.heads), len(attention.kv_heads))
        width = self.budget.ffn_width(
            ratio, shape.parameters, removed, shape.channel_parameters, shape.intermediate_size
        )
        with self._clock("forward"):
            self._apply_attention(layer_pass, attention, heads_BTA)
        ffn = self._ffn(i, dense, layer_pass, heads_BTA, shape, width, done)
        if not bool(torch.stack([x.isfinite().all() for x in self.blocks_BTD]).all()):
            raise ValueError(f"layer {i} gives NaN or infinite values in {self.dtype}; try --dtype float32")
        if done is not None:
            report = done.report
        else:
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
            with self._clock("write"):
                self.work.finish_layer(i, self._slice(dense, shape.heads, attention, ffn), report)
        if self.price < inf and report.ffn_price > 0:
            self.price = report.ffn_price
        self.frame.release(i)
        return report

    def _attention(
        self,
        i: int,
        dense: dict[str, Tensor],
        heads_BTA: list[Tensor],
        shape: LayerShape,
        ratio: float,
        done: FinishedLayer | None,
    ) -> _Kept:
        """Choose the heads that stay and refit ``o_proj``, or take both from an earlier run."""
        layout, name = shape.heads, f"{self.family.output}.weight"
        weight_DA = dense[name]
        all_heads, all_kv = list(range(layout.num_heads)), list(range(layout.num_kv_heads))
        if done is not None:
            columns_K = layout.columns(done.report.kept_heads)
            return _Kept(done.report.kept_heads, done.report.kept_kv_heads, columns_K, done.tensors[name])
        untouched = _Kept(all_heads, all_kv, layout.columns(all_heads), weight_DA)
        budget = self.budget.heads(ratio, layout.parameters, shape.parameters)
        needed = self.budget.forced(ratio, shape.parameters, shape.channel_parameters, shape.intermediate_size)
        too_small = budget < layout.smallest_unit(self.config.head_unit, self.config.head_multiple)
        if too_small or (self.price <= 0 and needed <= 0):
            return untouched
        with self._clock("gram"):
            gram = obs.Gram(weight_DA.shape[1], self.device, f"layer {i}, {self.family.output}")
            for x_BTA in heads_BTA:
                gram.add(x_BTA)
        with self._clock("select"):
            H_AA = gram.finish()
            W_DA = weight_DA.to(self.device, H_AA.dtype)
            damped = obs.damp(H_AA, self.config.percdamp, gram.name)
            steps = remove_heads(
                obs.silence_dead_columns(W_DA, H_AA),
                damped,
                layout,
                unit=self.config.head_unit,
                head_error=self.config.head_error,
                multiple=self.config.head_multiple,
                budget=budget,
                price=self.price,
                needed=needed,
            )
            if not steps:
                return untouched
            gone = {h for step in steps for h in step.heads}
            gone_kv = {kv for step in steps for kv in step.kv_heads}
            kept = [h for h in all_heads if h not in gone]
            kept_kv = [kv for kv in all_kv if kv not in gone_kv]
            return self._refit(W_DA, H_AA, damped, layout.columns(kept), weight_DA.dtype, kept, kept_kv)

    def _refit(
        self,
        W_DF: Tensor,
        H_FF: Tensor,
        damped: obs.Damped,
        columns_K: Tensor,
        dtype: torch.dtype,
        heads: list[int],
        kv_heads: list[int],
    ) -> _Kept:
        """Solve for the kept columns and round to the stored dtype; the error is that of the rounded weight."""
        columns_K = columns_K.to(H_FF.device)
        weight_DK = obs.refit(W_DF, damped.H_DD, columns_K).to(dtype)
        error = obs.relative_error(W_DF, weight_DK.to(W_DF.dtype), H_FF, columns_K)
        return _Kept(heads, kv_heads, columns_K.cpu(), weight_DK.cpu(), error, damped.damping)

    def _apply_attention(self, layer_pass: LayerPass, kept: _Kept, heads_BTA: list[Tensor]) -> None:
        """Replace each block's head outputs by what the pruned ``o_proj`` makes of them."""
        weight_DK, columns_K = kept.weight_DK.to(self.device, self.dtype), kept.columns_K.to(self.device)
        bias = layer_pass.linear(self.family.output).bias
        for b, x_BTA in enumerate(heads_BTA):
            heads_BTA[b] = functional.linear(x_BTA.index_select(-1, columns_K), weight_DK, bias)

    def _ffn(
        self,
        i: int,
        dense: dict[str, Tensor],
        layer_pass: LayerPass,
        attention_BTD: list[Tensor],
        shape: LayerShape,
        width: int,
        done: FinishedLayer | None,
    ) -> _Kept:
        """Choose the channels that stay, refit ``down_proj`` and move every block past the layer."""
        name, full = f"{self.family.down}.weight", shape.intermediate_size
        activations_BTF: list[Tensor] = []
        if done is not None:
            kept = _Kept([], [], torch.tensor(done.report.kept_channels), done.tensors[name])
        elif width == full:
            kept = _Kept([], [], torch.arange(full), dense[name])
        else:
            gram = obs.Gram(full, self.device, f"layer {i}, {self.family.down}")
            for x_BTD, a_BTD in zip(self.blocks_BTD, attention_BTD, strict=True):
                with self._clock("forward"):
                    x_BTF = layer_pass.channel_activations(x_BTD, a_BTD)
                with self._clock("gram"):
                    gram.add(x_BTF)
                if self.job.keeps_activations(shape):
                    activations_BTF.append(x_BTF)
            with self._clock("select"):
                kept = self._choose_channels(dense[name], gram, full - width)
        with self._clock("forward"):
            weight_DK, columns_K = kept.weight_DK.to(self.device, self.dtype), kept.columns_K.to(self.device)
            bias = layer_pass.linear(self.family.down).bias
            narrow = not self.job.keeps_activations(shape)
            if narrow:  # what was not kept is computed again, for the channels that stay
                layer_pass.narrow(columns_K)
            for b, (x_BTD, a_BTD) in enumerate(zip(self.blocks_BTD, attention_BTD, strict=True)):
                x_BTF = activations_BTF[b] if activations_BTF else layer_pass.channel_activations(x_BTD, a_BTD)
                x_BTK = x_BTF if narrow else x_BTF.index_select(-1, columns_K)
                mlp_BTD = functional.linear(x_BTK, weight_DK, bias)
                self.blocks_BTD[b] = layer_pass.output(x_BTD, a_BTD, mlp_BTD)
        return kept

    def _choose_channels(self, weight_DF: Tensor, gram: obs.Gram, count: int) -> _Kept:
        H_FF = gram.finish()
        W_DF = weight_DF.to(self.device, H_FF.dtype)
        damped = obs.damp(H_FF, self.config.percdamp, gram.name)
        path = remove_channels(
            obs.silence_dead_columns(W_DF, H_FF),
            damped,
            count,
            group_size_max=self.config.group_size_max,
            group_size_min=self.config.group_size_min,
        )
        stays_F = torch.ones(W_DF.shape[1], dtype=torch.bool, device=H_FF.device)
        stays_F[path.order] = False
        kept = self._refit(W_DF, H_FF, damped, stays_F.nonzero().flatten(), weight_DF.dtype, [], [])
        return replace(kept, marginal_error=path.marginal_error())

    def _slice(self, dense: dict[str, Tensor], layout: HeadLayout, attention: _Kept, ffn: _Kept) -> dict[str, Tensor]:
        """The pruned layer's tensors: what is gone is sliced away, never just zeroed."""
        family = self.family
        rows = {
            family.query: layout.columns(attention.heads),
            family.key: layout.columns(attention.kv_heads),
            family.value: layout.columns(attention.kv_heads),
            family.gate: ffn.columns_K,
            family.up: ffn.columns_K,
        }
        pruned = {
            name: tensor.index_select(0, rows[name.rpartition(".")[0]]) if name.rpartition(".")[0] in rows else tensor
            for name, tensor in dense.items()
        }
        pruned[f"{family.output}.weight"] = attention.weight_DK
        pruned[f"{family.down}.weight"] = ffn.weight_DK
        return pruned

    def _publish(self, layers: list[LayerReport], seconds: float) -> PruneReport:
        job, shapes = self.job, [layer.shape_of(shape) for layer, shape in zip(layers, self.job.shapes, strict=True)]
        with self._clock("write"):
            self.work.finish_rest()
            before, after = job.parameters(job.shapes), job.parameters(shapes)
            projections = sum(shape.parameters for shape in job.shapes)
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
                bytes_after=self.work.bytes,
                seconds=seconds,
                peak_memory_bytes=_peak_memory(self.device),
                device=_device_name(self.device),
                replayed_layers=self.work.replayed,
                seconds_by_phase=dict(self.seconds),
                versions={"torch": torch.__version__, "transformers": transformers.__version__},
            )
            self.work.publish(output.pruned_config(job.model_config, self.family, shapes), report)
        return report


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
