"""The report's plots as inline SVG. Text and axes take the page's own colour, so light and dark both read well."""

import io
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.report import Comparison

INK = "#010203"  # stands for the page's text colour; replaced by currentColor in the SVG
DENSE, PRUNED = "#888888", "#2a7de1"  # both readable on white and on near-black


@dataclass(frozen=True)
class Plot:
    """One figure: a file name's stem, its caption and the SVG element."""

    name: str
    caption: str
    svg: str


def all_plots(comparison: "Comparison") -> list[Plot]:
    """Widths and errors by depth, and, where a benchmark ran, throughput and latency."""
    plots = [
        _plot(
            "widths",
            "What is left of each layer, in percent of the dense width.",
            lambda axes: _widths(axes, comparison),
        ),
        _plot(
            "errors",
            "Relative squared error of each pruned map, on the calibration text.",
            lambda axes: _errors(axes, comparison),
        ),
    ]
    if comparison.bench is not None:
        plots += [
            _plot(
                "throughput",
                "New tokens per second: every run, and the median.",
                lambda axes: _throughput(axes, comparison),
            ),
            _plot(
                "latency",
                "Latency of the pruned model, dense = 1: median, lowest and highest pair.",
                lambda axes: _latency(axes, comparison),
            ),
        ]
    return plots


def _plot(name: str, caption: str, draw: Callable[[Any], None]) -> Plot:
    import matplotlib as mpl
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "font.family": "sans-serif"}
    style |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    buffer = io.StringIO()
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        if axes.get_xlabel() == "layer":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Plot(name, caption, _inline(buffer.getvalue(), name, caption))


def _inline(svg: str, name: str, caption: str) -> str:
    """Only the svg element, without fixed size and metadata, with ids of its own and the page's text colour."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('"#', f'"#{name}-').replace("url(#", f"url(#{name}-")
    return svg.replace(INK, "currentColor").strip()


def _widths(axes: Any, comparison: "Comparison") -> None:
    layers = comparison.pruning.layers
    depth = [layer.layer for layer in layers]
    axes.step(
        depth,
        [100 * x.intermediate_size / x.dense_intermediate_size for x in layers],
        where="mid",
        color=PRUNED,
        label="FFN width",
    )
    axes.step(
        depth,
        [100 * x.num_attention_heads / x.dense_num_attention_heads for x in layers],
        where="mid",
        color="#d9730d",
        label="heads",
    )
    axes.step(
        depth,
        [100 * x.num_key_value_heads / x.dense_num_key_value_heads for x in layers],
        where="mid",
        color="#2e9e5b",
        ls=":",
        label="kv heads",
    )
    axes.set(xlabel="layer", ylabel="% kept", ylim=(0, 105))
    axes.legend(loc="lower left")


def _errors(axes: Any, comparison: "Comparison") -> None:
    layers = comparison.pruning.layers
    depth = [layer.layer for layer in layers]
    axes.plot(depth, [layer.ffn_error for layer in layers], marker=".", color=PRUNED, label="FFN (down_proj)")
    axes.plot(
        depth, [layer.attention_error for layer in layers], marker=".", color="#d9730d", label="attention (o_proj)"
    )
    axes.set(xlabel="layer", ylabel="relative error")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")


def _throughput(axes: Any, comparison: "Comparison") -> None:
    assert comparison.bench is not None
    for place, (label, runs, colour) in enumerate(
        (("dense", comparison.bench.dense, DENSE), ("pruned", comparison.bench.pruned, PRUNED))
    ):
        values = [run["output_throughput"] for run in runs]
        axes.bar(place, statistics.median(values), width=0.6, color=colour, alpha=0.8)
        axes.plot([place] * len(values), values, "o", color=INK, markersize=3, ls="none")
        axes.text(place, 0, f"{statistics.median(values):.0f}\n{label}", ha="center", va="bottom", weight="bold")
    axes.set(ylabel="tokens/s", xticks=[])


def _latency(axes: Any, comparison: "Comparison") -> None:
    assert comparison.bench is not None
    names = ["mean_ttft_ms", "p95_ttft_ms", "mean_tpot_ms", "p95_tpot_ms", "p50_e2el_ms", "p95_e2el_ms", "p99_e2el_ms"]
    labels = ["TTFT mean", "TTFT p95", "TPOT mean", "TPOT p95", "request p50", "request p95", "request p99"]
    ratios = [comparison.bench.ratios[name] for name in names]
    spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    axes.barh(labels, [r.median for r in ratios], xerr=spread, color=PRUNED, alpha=0.8, ecolor=INK, height=0.6)
    axes.axvline(1, color=DENSE, ls="--")
    axes.invert_yaxis()
    axes.set(xlabel="pruned / dense (below 1 is quicker)")
