"""Settings: frozen dataclasses, checked when they are made. ``ratio`` is the dial; the rest has a default."""

import dataclasses
import hashlib
import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from slimgpt.quantities import BYTES, COUNTS, read_quantity

MAX_RATIO = 0.9


def option(default: Any, description: str, **limits: Any) -> Any:
    """A config field whose description and limits (ge, gt, le, lt) reach the CLI's help and the UI's form."""
    return field(default=default, metadata={"description": description, **limits})


LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def limits_text(metadata: Mapping[str, Any]) -> str:
    """A field's limits as help, forms and documents show them: "at least 0, at most 0.9"; empty where it has none."""
    return ", ".join(f"{words} {metadata[side]}" for side, words in LIMITS.items() if side in metadata)


def check_limits(config: Any) -> None:
    """Check every field of a config dataclass against its declared type and limits.

    A ``Path`` becomes its text, and 8.0 where an integer belongs becomes 8: what a config holds can be written as JSON.

    Raises:
        ValueError: naming the field, its value, the limit and what the field means.
    """
    for item in dataclasses.fields(config):
        value, meta = getattr(config, item.name), item.metadata
        choices = getattr(item.type, "__args__", ()) if getattr(item.type, "__origin__", None) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{item.name} is {value!r}; it must be one of {', '.join(map(str, choices))}")
        if item.type is str and isinstance(value, os.PathLike):
            object.__setattr__(config, item.name, os.fspath(value))
        elif item.type in (str, bool) and not isinstance(value, item.type):
            kind = "a text" if item.type is str else "true or false"
            raise ValueError(f"{item.name} is {value!r}; it must be {kind}: {meta['description']}")
        if item.type in (int, float):
            if isinstance(value, str) and _is_number(value):
                raise ValueError(f"{item.name} is the text {value!r}; write the number {float(value):g}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{item.name} is {value!r}; it must be a finite number: {meta['description']}")
            if item.type is int and value != int(value):
                raise ValueError(f"{item.name} is {value!r}; it must be an integer: {meta['description']}")
            if item.type is int:
                object.__setattr__(config, item.name, int(value))  # 8.0 is a number of nothing that can be indexed
            for side, words in LIMITS.items():
                if side in meta and not getattr(operator, side)(value, meta[side]):
                    raise ValueError(f"{item.name} is {value}; it must be {words} {meta[side]}: {meta['description']}")


def _is_number(text: str) -> bool:
    """Whether YAML's text stands for a number: it takes 1e-2, without a point, for a text."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


BosPolicy = Literal["auto", "none", "stream", "block"]
_BOS = (
    "BOS before the text: block (before every block, as one of its tokens), stream (once), none, or auto: block where "
    "the model's tokenizer or family has it, else none."
)


_RATIO = 0.25
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
        "", "Instead of the ratio: how many parameters the entire pruned model may have, such as 100M or 5.4B."
    )
    schedule: Literal["nats", "log", "linear", "uniform", "explicit"] = option(
        "log",
        "How the ratio is spread. log rises from the first layer to the last (the paper's); nats: what changes the "
        "model's distribution least, from a forward and a backward pass, over all heads and FFNs.",
    )
    first_ratio_share: float = option(
        0.25, "log and linear: the first layer's ratio as a share of the mean ratio.", ge=0, le=1
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
    head_error: Literal["exact", "paper"] = option(
        "exact", "A head's score: the exact error of removing it, or the paper's eq. 5."
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
        "Calibration text: a .jsonl or .parquet file of texts or conversations, a .txt file, c4, python (the text that "
        "ships with CPython), or auto. Several with their shares: c4,notes.txt:0.2.",
    )
    num_samples: int = option(128, "Calibration sequences.", ge=1)
    seq_len: int = option(2048, "Tokens per calibration sequence.", ge=2)
    seed: int = option(0, "Which passages are drawn.", ge=0)
    bos: Literal["auto", "none", "stream", "block"] = option("auto", _BOS)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Dtype of the forward passes; auto is float32 on CPU and the checkpoint's own on a GPU."
    )
    block_tokens: int = option(8192, "Tokens that pass a layer at once; lower it to save memory.", ge=1)
    keep_gib: float = option(
        4.0, "Memory (GiB) for keeping one layer's channel activations; beyond it they are recomputed.", ge=0
    )

    activations: Literal["auto", "device", "host", "disk"] = option(
        "auto",
        "Where the calibration set's activations wait between layers: on the device, in host memory or in a file in "
        "OUT; auto: the device where it has room, else host. The result is the same.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_ratios", tuple(self.layer_ratios))  # JSON and YAML bring lists
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
        if self.schedule == "nats" and self.head_error != "exact":
            raise ValueError(f"schedule is 'nats' and head_error {self.head_error!r}; prices need it to be 'exact'")
        for i, r in enumerate(self.layer_ratios):
            if not 0 <= r <= MAX_RATIO:
                raise ValueError(f"layer_ratios[{i}] is {r}; it must lie in [0, {MAX_RATIO}]")

        given = [name for name in (*_TARGETS, "layer_ratios") if getattr(self, name)]
        given += ["ratio"] if self.ratio != _RATIO else []
        if self.target and len(given) > 1:
            values = " and ".join(f"{name} {getattr(self, name)}" for name in given)
            raise ValueError(f"{values} each say how much is removed; leave all but one out")

    @property
    def target(self) -> tuple[str, int] | None:
        """The name of the target that replaces the ratio, and its bytes or parameters; None where the ratio counts."""
        for name, units in _TARGETS.items():
            if text := getattr(self, name):
                return name, read_quantity(text, units, name)
        return None

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
        "first_ratio_share": min(1.0, first_ratio / ratio) if ratio > 0 else 0.25,
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


# What can be done to a model, by the name of the step in its lineage.
STAGE_CONFIGS = {"prune": PruneConfig}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    tasks: tuple[str, ...] = option(
        ("auto",),
        "lm-eval tasks: names, auto (the paper's seven where their data is available, else continuation), or none.",
    )
    limit: float = option(0, "Documents per task, the first ones; below 1 a share of them; 0 is all.", ge=0)
    num_fewshot: int = option(-1, "Examples before each document of the tasks; -1: each task's own number.", ge=-1)
    apply_chat_template: bool = option(
        False, "Put the tasks' prompts through the model's chat template, examples as turns; for instruct models."
    )
    batch_size: int = option(8, "Sequences that pass the model at once.", ge=1)
    perplexity: str = option(
        "auto", "Text for perplexity: wikitext2, python, a .txt, .raw, .jsonl or .parquet file, auto, or none."
    )
    seq_len: int = option(1024, "Tokens per perplexity block.", ge=2)
    max_blocks: int = option(12, "Perplexity blocks, the first ones; 0 is all.", ge=0)
    bos: Literal["auto", "none", "stream", "block"] = option("auto", _BOS + " Tasks: before every prompt, unless none.")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Dtype of the model; auto is float32 on CPU and the checkpoint's own on a GPU."
    )

    def __post_init__(self) -> None:
        given: Any = self.tasks  # JSON and YAML bring lists, the command line "a,b"
        items = [given] if isinstance(given, str) else given
        tasks = tuple(name.strip() for item in items for name in item.split(",") if name.strip())
        object.__setattr__(self, "tasks", () if tasks == ("none",) else tasks)
        check_limits(self)
        if self.limit >= 1 and self.limit != int(self.limit):
            raise ValueError(f"limit is {self.limit:g}; it must be a whole number of documents, or a share below 1")
        object.__setattr__(self, "limit", int(self.limit) if self.limit == int(self.limit) else self.limit)
        if not self.tasks and self.perplexity == "none":
            raise ValueError("tasks is empty and perplexity is 'none'; nothing would be measured, name at least one")
