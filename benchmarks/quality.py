"""How good a pruned model is, ours beside other methods, at the same share of removed parameters.

    python -m benchmarks.quality                                       # SmolLM2: all methods, ablations, recoveries
    python -m benchmarks.quality --ratios 0.25 --methods default,FLAP --limit 100         # and the seven tasks
    python -m benchmarks.quality --model QWEN_FOLDER --ratios 0.25,0.5 --dtype bfloat16
    python -m benchmarks.quality --page                                # docs/results.md and its plot from the figures

Each model is written to benchmarks/quality.json as soon as it is measured; what stands there is not measured again, so
that an interrupted run goes on and a later one adds to it. Needs SLIMGPT_DATA.

Calibration: 32 sequences of 1024 tokens of C4. Perplexity: blocks of 1024, documents joined by EOS, the first token of
a block not scored; WikiText-2 test, 12 blocks; C4 validation, 24. KL: of the dense model's next-token distribution from
the pruned one's, in nats per token, over the first 8 of those C4 blocks.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimgpt.modeling  # noqa: F401  (registers the pruned forms)
from benchmarks.baselines import METHODS
from benchmarks.quality_page import write_page
from benchmarks.removal import Removal
from slimgpt.checkpoints.source import resolve_model
from slimgpt.config import EvalConfig, PruneConfig, RecoverConfig, paper_preset
from slimgpt.data.documents import Documents
from slimgpt.data.text import DATA_VARIABLE, TextSource, local_data, perplexity_text
from slimgpt.data.text_files import read_documents
from slimgpt.device import dtype_name
from slimgpt.engine.job import Job
from slimgpt.engine.pruner import prune
from slimgpt.evaluation.harness import evaluate
from slimgpt.evaluation.perplexity import perplexity
from slimgpt.files import write_atomically
from slimgpt.recovery.recoverer import recover

FIGURES = Path(__file__).parent / "quality.json"
SEQ_LEN = 1024
PRUNE = {"num_samples": 32, "seq_len": SEQ_LEN, "calibration": "c4"}
# Of this project: what each row changes in the default.
OURS: dict[str, dict[str, Any]] = {
    "SlimGPT (default)": {},
    "SlimGPT, log schedule": {"schedule": "log"},
    "SlimGPT, prices alone": {"log_share": 0.0},
    "SlimGPT, the paper's choices": {"preset": "paper"},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "no compensation": {"compensate": False},
    "fixed group size of 128": {"group_size_max": 128, "group_size_min": 128},
    "schedule linear": {"schedule": "linear"},
    "schedule uniform": {"schedule": "uniform"},
    "FFN only": {"targets": "ffn"},
    "heads at their price": {"head_price_factor": 1.0},
    "heads ten times their price": {"head_price_factor": 10.0},
    "any number of head layouts": {"max_head_shapes": 1000},
    "one head layout": {"max_head_shapes": 1},
    "8 samples": {"num_samples": 8},
    "128 samples": {"num_samples": 128},
    "128 samples of 256 tokens": {"num_samples": 128, "seq_len": 256},
    "percdamp 0.001": {"percdamp": 0.001},
    "percdamp 0.1": {"percdamp": 0.1},
    "calibration with a quarter Python": {"calibration": "c4,python:0.25"},
}
RECOVERIES: dict[str, dict[str, Any]] = {
    "recovered, adapters": {"trainable": "lora"},
    "recovered, all weights": {"trainable": "all"},
    "recovered, the paper's LoRA on Alpaca": {"method": "lora", "text": "alpaca"},
}
RECOVERY_TOKENS = "131072"


class Measured:
    """The dense model, the texts, and the figures of any model beside it."""

    def __init__(self, folder: Path, dtype: str):
        self.folder, self.dtype = folder, getattr(torch, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if (data := local_data()) is None:
            raise FileNotFoundError(f"{DATA_VARIABLE} is not set; it must name a folder with c4 and wikitext-2-raw")
        documents = list(read_documents(data / "c4/validation.jsonl"))
        joined = str(self.tokenizer.eos_token).join(documents)
        self.c4 = TextSource(name="c4", documents=Documents([joined]), origin="local data")
        self.dense = self.load(folder)

    def load(self, folder: Path) -> Any:
        """A model in the dtype of the measurements."""
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()

    def figures(self, model: Any, limit: int) -> dict[str, Any]:
        """Perplexities, KL, and where a limit is given the seven tasks."""
        texts = {"wikitext2": (perplexity_text("wikitext2"), 12), "c4": (self.c4, 24)}
        found: dict[str, Any] = {
            name: perplexity(model, self.tokenizer, text, seq_len=SEQ_LEN, max_blocks=blocks).perplexity
            for name, (text, blocks) in texts.items()
        }
        return found | {"kl": self.kl(model)} | (self.tasks(model, limit) if limit else {})

    @torch.no_grad()
    def kl(self, model: Any, blocks: int = 8) -> float:
        """Mean KL in nats per token, logits 128 tokens at a time."""
        text = "".join(self.c4.documents)[: blocks * SEQ_LEN * 8]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: blocks * SEQ_LEN]
        total = 0.0
        for ids_T in torch.tensor(ids).split(SEQ_LEN):
            dense, pruned = (x(input_ids=ids_T[None], use_cache=False).logits[0] for x in (self.dense, model))
            for p_TV, q_TV in zip(dense.split(128), pruned.split(128), strict=True):
                p, q = p_TV.float().log_softmax(dim=-1), q_TV.float().log_softmax(dim=-1)
                total += float(functional.kl_div(q, p, log_target=True, reduction="sum"))
        return total / len(ids)

    def tasks(self, model: Any, limit: int) -> dict[str, Any]:
        """Accuracy and its standard error, in percent, of each of the seven tasks on its first ``limit`` documents."""
        config = EvalConfig(limit=limit, perplexity="none", device="cpu")
        metrics = evaluate(self.folder, config, model=model, tokenizer=self.tokenizer).metrics
        scored = {}
        for task in dict.fromkeys(name.partition("/")[0] for name in metrics):
            kind = "acc_norm" if f"{task}/acc_norm" in metrics else "acc"
            scored[task] = [100 * metrics[f"{task}/{kind}{end}"] for end in ("", "_stderr")]
        return {"tasks": scored, "limit": limit}


def by_others(measured: Measured, name: str, ratio: float) -> tuple[Any, float]:
    """A dense model that this method pruned, and the share of parameters it removed."""
    model = measured.load(measured.folder)
    removal = Removal(model)
    METHODS[name](removal, Job(measured.folder, PruneConfig(**PRUNE)).calibration().ids_NT, ratio)
    return model, removal.ratio


def by_us(measured: Measured, settings: dict[str, Any], ratio: float, place: Path) -> tuple[Any, float]:
    """A model that this project pruned, and the share of parameters it removed."""
    settings, compensate = dict(settings), settings.get("compensate", True)
    settings.pop("compensate", None)
    preset = paper_preset(ratio) if settings.pop("preset", "") == "paper" else {}
    dtype = {"dtype": dtype_name(measured.dtype)}
    report = prune(measured.folder, place, PruneConfig(**{**preset, **PRUNE, **dtype, "ratio": ratio, **settings}))
    if compensate:
        return measured.load(place), report.ratio
    removal = Removal(measured.load(measured.folder))  # the same units, the rest of the weights as they were
    for layer in report.layers:
        gone = torch.ones_like(removal.channels[layer.layer])
        gone[layer.kept_channels] = False
        removal.drop_channels(layer.layer, gone)
        o_proj = removal.layers[layer.layer].self_attn.o_proj.weight.data
        heads = o_proj.view(o_proj.shape[0], layer.dense_num_attention_heads, -1)
        heads[:, [h for h in range(layer.dense_num_attention_heads) if h not in layer.kept_heads]] = 0
    return removal.model, report.ratio


def recovered(measured: Measured, settings: dict[str, Any], ratio: float, place: Path) -> tuple[Any, float]:
    """The default's model, trained."""
    pruned = place.with_name("pruned")
    _, reached = by_us(measured, {}, ratio, pruned)
    recover(pruned, place, RecoverConfig(**{"tokens": RECOVERY_TOKENS, **settings}), teacher=measured.folder)
    return measured.load(place), reached


def rows(measured: Measured) -> dict[str, Callable[[float, Path], tuple[Any, float]]]:
    """Everything that can be measured: name -> how such a model is made, given a ratio and a folder."""
    return {
        **{name: lambda ratio, _, name=name: by_others(measured, name, ratio) for name in METHODS},
        **{
            name: lambda ratio, place, settings=settings: by_us(measured, settings, ratio, place)
            for name, settings in {**OURS, **ABLATIONS}.items()
        },
        **{
            name: lambda ratio, place, settings=settings: recovered(measured, settings, ratio, place)
            for name, settings in RECOVERIES.items()
        },
    }


def known() -> list[dict[str, Any]]:
    """The rows measured so far."""
    return json.loads(FIGURES.read_text()) if FIGURES.is_file() else []


def measure(measured: Measured, name: str, ratio: float, limit: int, make: Callable[..., Any]) -> None:
    """Measure one row, unless it stands there, and add it to the figures."""
    dtype = dtype_name(measured.dtype)
    key = {"model": measured.folder.name, "dtype": dtype, "method": name, "ratio": ratio}
    done = [row for row in known() if {k: row[k] for k in key} == key]
    if any(row.get("limit", 0) >= limit for row in done):
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        model, reached = make(ratio, Path(place) / "out")
        seconds = time.perf_counter() - start
        row = key | {"removed": reached, "seconds": seconds} | measured.figures(model, limit)
    print(json.dumps(row), flush=True)
    others = [row for row in known() if {k: row[k] for k in key} != key]
    write_atomically(FIGURES, json.dumps([*others, row], indent=1) + "\n")


def main() -> None:
    """Measure what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ratios", default="0.2,0.25,0.33,0.5")
    parser.add_argument("--methods", default="", help="names of rows, separated by commas; a part of a name will do")
    parser.add_argument("--limit", type=int, default=0, help="documents of each of the seven tasks; 0: no tasks")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    if not given.page:
        measured = Measured(resolve_model(given.model), given.dtype)
        measure(measured, "dense", 0.0, given.limit, lambda *_: (measured.dense, 0.0))
        for ratio in map(float, given.ratios.split(",")):
            for name, make in rows(measured).items():
                if not given.methods or any(part in name for part in given.methods.split(",")):
                    measure(measured, name, ratio, given.limit, make)
    write_page(known())


if __name__ == "__main__":
    main()
