"""The plots of a pruning, an evaluation and a benchmark as inline SVG, in the page's colours, for light and dark."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy.bench.results import SIDES, BenchReport, Load
from slimgpt.evaluation.metrics import percent

if TYPE_CHECKING:
    from deploy.report.comparison import Comparison
    from slimgpt.report import LayerReport

# matplotlib wants colours, the page has variables: each stands for a variable, and is what shows outside the page.
INK, GRID = "#010203", "#80818240"
COLOURS = {"dense": "#7c8798", "pruned": "#2a7de1", "heads": "#d9730d", "kv": "#2e9e5b"}
WIDTH, HEIGHT = 5.2, 3.1  # inches, of 72 units of the SVG


@dataclass(frozen=True)
class Plot:
    """One figure: a file name's stem, its title, its caption and the SVG element."""

    name: str
    title: str
    caption: str
    svg: str


def layer_plots(layers: "list[LayerReport]") -> list[Plot]:
    """Widths and errors by depth."""
    return [
        draw_plot(
            "widths", "Widths by depth", "What is left of each layer, in percent of the dense width.", _widths, layers
        ),
        draw_plot(
            "errors",
            "Error by depth",
            "Relative squared error of each pruned map, on the calibration text.",
            _errors,
            layers,
        ),
    ]


def bench_plots(bench: BenchReport) -> list[Plot]:
    """Throughput, latency against load where several loads were measured, and the latency's ratios."""
    pairs = f"{len(bench.full.dense)} dense-pruned pairs"
    speeds = f"New tokens per second: the median, and every run of {pairs}."
    plots = [draw_plot("throughput", "Throughput", speeds, _speeds, bench)]
    if len(bench.loads) > 1:
        caption = "Whole requests as they arrive: medians of the runs; open marks on the right: all requests at once."
        plots.append(draw_plot("load", "Latency against load", caption, _load, bench.loads))
    caption = f"All requests at once, dense = 1: median, lowest and highest of {pairs}."
    return [*plots, draw_plot("latency", "Latency, pruned over dense", caption, _latency, bench)]


def all_plots(comparison: "Comparison") -> list[Plot]:
    """Widths and errors by depth, and, where they were measured, accuracies, throughput and latency."""
    plots = layer_plots(comparison.lineage.layers)
    if comparison.accuracies:
        caption = "Dense and pruned, with 95 % confidence intervals."
        plots.append(draw_plot("accuracy", "Accuracy by task", caption, _accuracy, comparison))
    return plots + (bench_plots(comparison.bench) if comparison.bench else [])


def draw_plot(name: str, title: str, caption: str, draw: Callable[[Any, Any], None], data: Any) -> Plot:
    """One figure of one pair of axes: ``draw(axes, data)`` fills them."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "font.family": "sans-serif"}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    style |= {"axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    style |= {"axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True}
    style |= {"xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.8, "legend.fontsize": 9}
    buffer = io.StringIO()
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes, data)
        if axes.get_xlabel() == "layer":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Plot(name, title, caption, _inline(buffer.getvalue(), name, f"{title}. {caption}"))


def _inline(svg: str, name: str, label: str) -> str:
    """Only the svg element, without fixed size and metadata, with ids of its own, the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('"#', f'"#{name}-').replace("url(#", f"url(#{name}-")
    svg = re.sub(r"(font: (?:[a-z]+ |\d+ )*[\d.]+px )[^;\"]*", r"\1system-ui, sans-serif", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    return svg.replace(INK, "currentColor").strip()


def _widths(axes: Any, layers: "list[LayerReport]") -> None:
    depth = [layer.layer for layer in layers]
    kept = [100 * x.intermediate_size / x.dense_intermediate_size for x in layers]
    axes.bar(depth, kept, width=0.82, color=COLOURS["pruned"], alpha=0.35, label="FFN width")
    for label, colour, marker, parts in (
        ("heads", "heads", "o", [(x.num_attention_heads, x.dense_num_attention_heads) for x in layers]),
        ("kv heads", "kv", "_", [(x.num_key_value_heads, x.dense_num_key_value_heads) for x in layers]),
    ):
        values = [100 * part / whole for part, whole in parts]
        axes.plot(depth, values, marker, color=COLOURS[colour], markersize=4 if marker == "o" else 8, label=label)
    axes.set(xlabel="layer", ylabel="% kept", ylim=(0, 105))
    axes.grid(visible=False, axis="x")
    legend_above(axes, 3)


def legend_above(axes: Any, columns: int) -> None:
    """One line above the axes, where no mark can lie under it."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, columnspacing=1.2)


def _errors(axes: Any, layers: "list[LayerReport]") -> None:
    depth = [layer.layer for layer in layers]
    axes.plot(
        depth, [x.ffn_error for x in layers], "o-", markersize=3, color=COLOURS["pruned"], label="FFN (down_proj)"
    )
    attention = [x.attention_error for x in layers]
    axes.plot(depth, attention, "o-", markersize=3, color=COLOURS["heads"], label="attention (o_proj)")
    axes.set(xlabel="layer", ylabel="relative error")
    axes.set_ylim(bottom=0)
    legend_above(axes, 2)


def _accuracy(axes: Any, comparison: "Comparison") -> None:
    from deploy.report.comparison import Z95

    tasks = list(comparison.accuracies.items())
    for side, shift in zip(SIDES, (-0.14, 0.14), strict=True):
        metrics = comparison.dense if side == "dense" else comparison.pruned
        axes.errorbar(
            [percent(name, metrics[name]) for _, name in tasks],
            [place + shift for place in range(len(tasks))],
            xerr=[Z95 * percent(name, metrics.get(f"{name}_stderr", 0)) for _, name in tasks],
            fmt="o",
            markersize=5,
            elinewidth=1.6,
            color=COLOURS[side],
            label=side,
        )
    axes.set_yticks(range(len(tasks)), [task for task, _ in tasks])
    axes.set(xlabel="% correct", xlim=(0, 100), ylim=(len(tasks) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    legend_above(axes, 2)


def _speeds(axes: Any, bench: BenchReport) -> None:
    measured = [("served", bench.full)] + ([("offline", bench.throughput)] if bench.throughput else [])
    for place, (_, runs) in enumerate(measured):
        for side, shift in zip(SIDES, (-0.2, 0.2), strict=True):
            values = [run["output_throughput"] for run in (runs.dense if side == "dense" else runs.pruned)]
            middle = runs.median(side, "output_throughput")
            label = side if place == 0 else None
            axes.bar(place + shift, middle, width=0.36, color=COLOURS[side], alpha=0.75, label=label)
            axes.plot([place + shift] * len(values), values, "o", color=INK, markersize=3)
            axes.text(place + shift, 0, f"{middle:.0f}", ha="center", va="bottom", weight="bold")
    axes.set(ylabel="new tokens per second", xlim=(-0.6, len(measured) - 0.4))
    axes.set_xticks(range(len(measured)), [label for label, _ in measured])
    axes.grid(visible=False, axis="x")
    legend_above(axes, 2)


def _load(axes: Any, loads: Sequence[Load]) -> None:
    arriving = sorted(loads[1:], key=lambda load: load.request_rate)
    for side in SIDES:
        for metric, line in (("p50_e2el_ms", "-"), ("p95_e2el_ms", ":")):
            seconds = [load.runs.median(side, metric) / 1000 for load in arriving]
            rates = [load.request_rate for load in arriving]
            label = f"{side}, {metric[:3]}"
            axes.plot(rates, seconds, f"o{line}", markersize=4, color=COLOURS[side], label=label)
            full = loads[0].runs
            x, y = full.median(side, "request_throughput"), full.median(side, metric) / 1000
            axes.plot([x], [y], "o", markersize=6, mfc="none", color=COLOURS[side])
    axes.set(xlabel="requests per second", ylabel="seconds for a whole request")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    legend_above(axes, 2)


def _latency(axes: Any, bench: BenchReport) -> None:
    names = ["mean_ttft_ms", "p95_ttft_ms", "mean_tpot_ms", "p95_tpot_ms", "p50_e2el_ms", "p95_e2el_ms", "p99_e2el_ms"]
    labels = ["TTFT mean", "TTFT p95", "TPOT mean", "TPOT p95", "request p50", "request p95", "request p99"]
    ratios = [bench.ratios[name] for name in names]
    spread = [[r.median - r.low for r in ratios], [r.high - r.median for r in ratios]]
    axes.errorbar(
        [r.median for r in ratios], labels, xerr=spread, fmt="o", markersize=6, elinewidth=1.6, color=COLOURS["pruned"]
    )
    axes.axvline(1, color=COLOURS["dense"], ls="--")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="pruned / dense (below 1 is quicker)")
