"""How seconds and peak memory grow with tokens, depth and width on CPU, and what follows for large models on GPUs.

    python benchmarks/scaling.py                   # measures (about 5 minutes), writes scaling.json and docs/scale.svg
    python benchmarks/scaling.py --tables          # prints the tables of docs/scale.md: counted, nothing is measured

Each point is a random LLaMA pruned by 25 % in a child process (memory.py says how its memory is read). Beside it stand
operations and bytes as slimgpt/engine/cost.py counts them, and the seconds that follow from the rate of one product.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from memory import measured
from random_llama import SHAPES, Shape

from slimgpt.config import PruneConfig
from slimgpt.engine.activations import Place
from slimgpt.engine.cost import Cost, Setting, estimate, price_samples
from slimgpt.engine.job import CPU_KEEP
from slimgpt.engine.rates import Rates
from slimgpt.method.allocation import planned_shapes

HERE = Path(__file__).parent
BASE = Shape(512, 1408, 4, 8, 8, vocab_size=4096)
SEQ_LEN, TOKENS = 512, 8192
# One H100 or H200 SXM, whose units are the same. Products are measured on an H200 (benchmarks/RESULTS.md); assumed are
# 60 % of PCIe 5 x16 and of NVLink, and a good NVMe disk.
HOPPER = Rates(forward=760e12, gram=580e12, solve=62e12, moved=40e9, reduced=250e9, read=3e9, written=1.5e9)
CARD = int(0.9 * 80e9)  # bytes that a run plans with
LARGE = {"7B": "llama-2-7b", "13B": "llama-2-13b", "70B": "llama-2-70b", "405B": "llama-3.1-405b"}


def points() -> Iterator[tuple[str, int, Shape, int]]:
    """What varies, by how much, and the model and tokens that makes."""
    for tokens in (8192, 16384, 32768, 65536):
        yield "tokens", tokens, BASE, tokens
    for layers in (2, 4, 8, 16):
        yield "layers", layers, replace(BASE, num_hidden_layers=layers), TOKENS
    for hidden in (256, 512, 1024, 2048):
        wide = replace(BASE, hidden_size=hidden, intermediate_size=11 * hidden // 4, num_attention_heads=hidden // 64)
        yield "hidden", hidden, replace(wide, num_key_value_heads=hidden // 64), TOKENS


def counted(shape: Shape, config: PruneConfig, *, cpu: bool, place: Place, processes: int) -> Cost:
    """The cost of pruning this shape: float32 on a CPU, bfloat16 on GPUs."""
    item = 4 if cpu else 2
    dense = [shape.layer] * shape.num_hidden_layers
    widest, priced = shape.intermediate_size, config.schedule == "nats"
    setting = Setting(
        samples=config.num_samples,
        seq_len=config.seq_len,
        block_tokens=config.block_tokens,
        item=item,
        stored=item,
        keep=CPU_KEEP if cpu else 0,
        cpu=cpu,
        place=place,
        processes=processes,
        price_samples=price_samples(widest, config.num_samples, config.seq_len, processes) if priced else 0,
    )
    embedding, pruned = shape.vocab_size * shape.hidden_size, planned_shapes(config, dense)
    count = partial(
        estimate,
        dense,
        pruned,
        embedding=embedding,
        embedding_bytes=embedding * setting.stored,
        weight_bytes=(2 * embedding + sum(s.parameters for s in pruned)) * setting.stored,
    )
    if not cpu:  # what is free is for channel activations
        setting = replace(setting, keep=max(0, CARD - count(setting).device))
    return count(setting)


def measure() -> list[dict[str, Any]]:
    """Every point once."""
    lines = []
    for varied, value, shape, tokens in points():
        config = PruneConfig(
            ratio=0.25,
            num_samples=tokens // SEQ_LEN,
            seq_len=SEQ_LEN,
            device="cpu",
            schedule="log",
            ffn_multiple=16,  # the narrow ones could not meet the ratio with 64
        )
        cost = counted(shape, config, cpu=True, place="device", processes=1)
        line = {"varied": varied, "value": value, **measured(shape, "", config), "counted": asdict(cost)}
        print(json.dumps({k: line[k] for k in ("varied", "value", "seconds", "planned_seconds", "peak")}), flush=True)
        lines.append(line)
    return lines


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Seconds above, memory below; one column for each of tokens, depth and width."""
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "scale", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharey="row", layout="constrained")
    labels = {"tokens": "calibration tokens", "layers": "decoder layers", "hidden": "hidden size"}
    for (varied, label), (above, below) in zip(labels.items(), axes.T, strict=True):
        of_kind = [line for line in lines if line["varied"] == varied]
        x = [line["value"] for line in of_kind]
        above.plot(x, [line["seconds"] for line in of_kind], "o-", label="measured")
        above.plot(x, [sum(line["planned_seconds"].values()) for line in of_kind], "x--", label="counted")
        below.plot(x, [line["peak"] for line in of_kind], "o-", label="measured")
        below.plot(x, [line["planned_peak"] for line in of_kind], "x--", label="counted")
        above.set(xscale="log", yscale="log")
        below.set(xscale="log", xlabel=label)
        for axis in (above, below):
            axis.set_xticks(x, [f"{v // 1024} k" if v >= 8192 else str(v) for v in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[1, 0].set_ylim(bottom=0)  # of the whole row, once all is drawn
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, GiB")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def tables() -> None:
    """The paper's setting on H100s, in Markdown."""
    config = PruneConfig(ratio=0.25, num_samples=256, seq_len=2048)
    print(
        "| model | GPUs | activations | forward s | Gram s | select s | read, write s | total | device GB | host GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, shape in LARGE.items():
        for processes in (1, 8):
            for place in ("device", "host"):
                cost = counted(SHAPES[shape], config, cpu=False, place=place, processes=processes)  # type: ignore[arg-type]
                s = HOPPER.seconds(cost)
                times = [s["forward"], s["gram"], s["select"], s["read"] + s["write"], sum(s.values())]
                sizes = [cost.device / 1e9, cost.host / 1e9]
                cells = [name, processes, place, *(f"{x:,.0f}" for x in times), *(f"{x:,.1f}" for x in sizes)]
                print("| " + " | ".join(map(str, cells)) + " |")
    print("\n| model | counted: forward | Gram | solve | H summed over GPUs | read | written (disk) | activations |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape in LARGE.items():
        cost = counted(SHAPES[shape], config, cpu=False, place="disk", processes=8)
        whole = counted(SHAPES[shape], config, cpu=False, place="disk", processes=1)
        operations = [f"{x / 1e15:,.1f} P" for x in (whole.forward, whole.gram, whole.solve)]
        sizes = [cost.reduced, cost.read / 2, cost.written, whole.disk - whole.written]
        print("| " + " | ".join([name, *operations, *(f"{x / 1e9:,.0f} GB" for x in sizes)]) + " |")


def main() -> None:
    """Measure and plot, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--plot", action="store_true", help="draw again what scaling.json holds")
    asked = parser.parse_args()
    results = HERE / "scaling.json"
    if asked.tables:
        tables()
        return
    if not asked.plot:
        results.write_text(json.dumps(measure(), indent=1) + "\n")
    (HERE.parent / "docs").mkdir(exist_ok=True)
    plot(json.loads(results.read_text()), HERE.parent / "docs" / "scale.svg")


if __name__ == "__main__":
    main()
