"""How a model is pruned. ``ratio`` is the dial; the rest has a default."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from slimgpt.config.fields import BOS_WORDS, DTYPE_WORDS, check_limits, numbers_of, option, whole_as_text
from slimgpt.quantities import BYTES, COUNTS, read_quantity

MAX_RATIO = 0.9
_RATIO = 0.25
_FIRST_RATIO_SHARE = 0.25
_TARGETS = {"target_size": BYTES, "target_parameters": COUNTS}


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How a model is pruned. Every field but ``ratio`` has a default that suits most models.

    Raises:
        ValueError: on construction, when a field is outside its limits or two fields contradict each other.
    """

    ratio: float = option(
        _RATIO,
        "Share of the decoder layers' projection parameters to remove; 0.25 removes a quarter.",
        ge=0,
        le=MAX_RATIO,
    )
    target_size: str = option(
        "", "Instead of the ratio: what the pruned model's weight files may take, such as 200MB (10^6 bytes) or 1.5GB."
    )
    target_parameters: str = option(
        "",
        "Instead of the ratio: how many parameters the entire pruned model may have, such as 100M, 5.4B or 81430848.",
    )
    target_speedup: float = option(
        0.0,
        "Instead of the ratio: how many times as fast the benchmark's requests are to be, such as 1.4; widths then "
        "spend milliseconds, as measured in vLLM on this machine. 0: not requested.",
        ge=0,
    )
    schedule: Literal["nats", "log", "linear", "uniform", "log_decreasing", "linear_decreasing", "explicit"] = option(
        "nats",
        "How the ratio is spread. nats: what changes the model's distribution least, from a forward and a backward "
        "pass, over all heads and FFNs; log rises from the first layer to the last (the paper's). The decreasing ones "
        "fall from the first to the last: the paper's ablations.",
    )
    first_ratio_share: float = option(
        _FIRST_RATIO_SHARE,
        "log and linear, rising or falling: the ratio of the layer with the smallest one, as a share of the mean "
        "ratio. That is the first layer; with a decreasing schedule the last.",
        ge=0,
        le=1,
    )
    layer_ratios: tuple[float, ...] = option(
        (), "explicit: one ratio per decoder layer, first to last; their mean must be the ratio."
    )
    targets: Literal["all", "attention", "ffn"] = option(
        "all", "What is pruned: heads and FFN channels, or one of them."
    )
    head_unit: Literal["auto", "kv_group", "query"] = option(
        "auto",
        "Grouped-query attention: remove whole kv groups, one query head from every group, or whichever costs less.",
    )
    head_budget: Literal["price", "ratio"] = option(
        "price",
        "price: heads go only where a parameter of theirs costs less error than one of the FFN; ratio: the paper's, "
        "every layer's heads lose the layer's ratio.",
    )
    head_price_factor: float = option(
        3.0,
        "Schedule nats: how many times their price heads count. Texts unlike the calibration text suffer more from "
        "heads that are gone than the price says.",
        gt=0,
    )
    log_share: float = option(
        1.0,
        "Schedule nats: how far the first layer is drawn from its prices towards the log schedule; by even steps less "
        "in those behind it, the last not at all. 0: prices alone, which take too much from early layers.",
        ge=0,
        le=1,
    )
    max_head_shapes: int = option(
        4,
        "Schedule nats: how many layouts of heads may differ among the layers: engines prepare attention for each of "
        "them at every step.",
        ge=1,
    )
    head_error: Literal["exact", "paper", "diagonal"] = option(
        "exact",
        "A head's score: the exact error of removing it; the paper's eq. 5; or diagonal, its ablation without grouped "
        "Cholesky: the errors of its columns, as if each went alone (eq. 4), summed.",
    )
    skip_first: int = option(0, "Leave this many first layers untouched.", ge=0)
    skip_last: int = option(0, "Leave this many last layers untouched.", ge=0)
    ffn_multiple: int = option(64, "FFN widths are multiples of this, which kernels run fast.", ge=1)
    head_multiple: int = option(
        1, "Heads and kv heads per layer are multiples of this: the largest tensor-parallel size to serve with.", ge=1
    )
    group_size_max: int = option(1024, "Dynamic group size: channels removed together while the target is far.", ge=1)
    group_size_min: int = option(8, "Dynamic group size: channels removed together close to the target.", ge=1)
    percdamp: float = option(0.01, "Damping of H, as a share of its mean diagonal.", ge=0)
    calibration: str = option(
        "auto",
        "Calibration text: a .jsonl or .parquet file of texts, conversations or instructions with answers, a .txt "
        "file, c4, alpaca (its prompts with the answers), python (the text that ships with CPython), or auto. Several "
        "with their shares: c4,notes.txt:0.2.",
    )
    num_samples: int = option(128, "Calibration sequences.", ge=1)
    seq_len: int = option(2048, "Tokens per calibration sequence.", ge=2)
    seed: int = option(0, "Which passages are drawn.", ge=0, le=2**63 - 1)
    bos: Literal["auto", "none", "stream", "block"] = option("auto", BOS_WORDS)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Dtype of the forward passes. " + DTYPE_WORDS
    )
    block_tokens: int = option(8192, "Tokens that pass a layer at once; lower it to save memory.", ge=1)
    keep_gib: float = option(
        -1.0,
        "Memory (GiB) for keeping one layer's channel activations; where they need more they are computed again, to "
        "the same bits. -1: on a GPU what the run leaves free, on a CPU 4.",
        ge=-1,
    )
    activations: Literal["auto", "device", "host", "disk"] = option(
        "auto",
        "Where the calibration set's activations wait between layers: on the device, in host memory or in a file in "
        "OUT; auto: the device where it has room, else host. The result is the same.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_ratios", numbers_of("layer_ratios", self.layer_ratios))
        whole_as_text(self, *_TARGETS)
        check_limits(self)
        if self.group_size_min > self.group_size_max:
            raise ValueError(
                f"group_size_min ({self.group_size_min}) is larger than group_size_max ({self.group_size_max}); "
                "groups shrink from max to min"
            )
        if (self.schedule == "explicit") != bool(self.layer_ratios):
            raise ValueError(
                f"schedule is {self.schedule!r} and layer_ratios has {len(self.layer_ratios)} entries; "
                "layer_ratios belongs to schedule='explicit' and is needed there"
            )
        for name in ("skip_first", "skip_last"):
            if self.layer_ratios and (value := getattr(self, name)):
                raise ValueError(
                    f"{name} is {value} and schedule 'explicit', whose layer_ratios say what each layer loses: leave "
                    f"{name} out, and give 0 for layers that are to stay"
                )
        for name, wanted in (("head_error", "exact"), ("head_budget", "price")):
            if self.schedule == "nats" and (value := getattr(self, name)) != wanted:
                raise ValueError(
                    f"schedule is 'nats' and {name} {value!r}; with prices it is {wanted!r}: choose schedule 'log', "
                    "which has the choice"
                )
        if self.schedule == "nats" and self.first_ratio_share != _FIRST_RATIO_SHARE:
            raise ValueError(
                f"schedule is 'nats' and first_ratio_share {self.first_ratio_share:g}; it belongs to the schedules log "
                "and linear and the decreasing ones: choose one of them, or see log_share and skip_first"
            )
        for i, r in enumerate(self.layer_ratios):
            if not 0 <= r <= MAX_RATIO:
                raise ValueError(f"layer_ratios[{i}] is {r}; it must lie in [0, {MAX_RATIO}]")

        if 0 < self.target_speedup <= 1:
            raise ValueError(f"target_speedup is {self.target_speedup:g}; it must be above 1, such as 1.4")
        if self.target_speedup and self.schedule != "nats":
            raise ValueError(
                f"target_speedup is {self.target_speedup:g} and schedule {self.schedule!r}; only the schedule nats "
                "spends milliseconds"
            )
        given = [name for name in (*_TARGETS, "target_speedup", "layer_ratios") if getattr(self, name)]
        given += ["ratio"] if self.ratio != _RATIO else []
        if self.target and len(given) > 1:
            values = " and ".join(f"{name} {getattr(self, name)}" for name in given)
            raise ValueError(f"{values} each say how much is removed; leave all but one out")

    @property
    def target(self) -> tuple[str, float] | None:
        """The name of the target that replaces the ratio, and its value: bytes, parameters, or times as fast.

        None where the ratio counts.
        """
        for name, units in _TARGETS.items():
            if text := getattr(self, name):
                return name, read_quantity(text, units, name)
        return ("target_speedup", self.target_speedup) if self.target_speedup else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML hold it: tuples are lists."""
        return {**dataclasses.asdict(self), "layer_ratios": list(self.layer_ratios)}

    def fingerprint(self) -> str:
        """sha256 of every field: two runs that differ in any setting are two runs."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def paper_preset(ratio: float) -> dict[str, Any]:
    """Settings of the paper's method to the letter: ``PruneConfig(**paper_preset(0.2))``.

    Its ratios count all parameters, ours those of the decoder's projections. The first layer's ratios are those of its
    appendix: 1/16 up to a third, 1/8 at one half. The FFN still makes up for the rounding of heads.
    """
    first_ratio = 0.0625 if ratio < 0.4 else 0.125
    return {
        "ratio": ratio,
        "schedule": "log",
        "first_ratio_share": min(1.0, first_ratio / ratio) if ratio > 0 else _FIRST_RATIO_SHARE,
        "head_budget": "ratio",
        "head_error": "paper",
        "head_unit": "kv_group",
        "ffn_multiple": 1,
        "group_size_max": 1024,
        "group_size_min": 8,
        "percdamp": 0.01,
        "calibration": "c4",
        "num_samples": 256,
        "seq_len": 2048,
        "bos": "none",
    }
