"""Dense against pruned, told once: the rows that HTML, markdown, the UI's table and the terminal all show."""

import statistics
from dataclasses import dataclass, field
from typing import Any

from deploy.bench_report import BenchReport
from slimgpt.report import PruneReport

HEADER = ("figure", "dense", "pruned", "change")

# bench metric -> (label, unit, digits)
_BENCH_ROWS = {
    "output_throughput": ("Throughput, new tokens", "tokens/s", 0),
    "total_token_throughput": ("Throughput, all tokens", "tokens/s", 0),
    "mean_ttft_ms": ("Time to first token, mean", "ms", 0),
    "p95_ttft_ms": ("Time to first token, p95", "ms", 0),
    "mean_tpot_ms": ("Time per further token, mean", "ms", 1),
    "p95_tpot_ms": ("Time per further token, p95", "ms", 1),
    "mean_itl_ms": ("Between tokens, mean", "ms", 1),
    "p50_e2el_ms": ("Whole request, p50", "ms", 0),
    "p95_e2el_ms": ("Whole request, p95", "ms", 0),
    "p99_e2el_ms": ("Whole request, p99", "ms", 0),
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that one compression measured.

    Args:
        title: the model's name in the registry.
        pruning: what pruning did.
        dense, pruned: flat evaluation metrics by name: ``wikitext2/perplexity``, ``piqa/acc``, ``piqa/acc_stderr``.
        bench: the benchmark, or None where it was skipped.
        data: one line per text or data set that was used.
        skipped: one line per step that was left out: why, and what would run it.
    """

    title: str
    pruning: PruneReport
    dense: dict[str, float]
    pruned: dict[str, float]
    bench: BenchReport | None = None
    data: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def perplexity_name(self) -> str:
        """The metric of the perplexity that was measured, or an empty string."""
        return next((name for name in self.pruned if name.endswith("/perplexity")), "")

    @property
    def accuracies(self) -> dict[str, str]:
        """Task -> the metric that is quoted for it: acc_norm where the task defines it, else acc."""
        tasks = [name.rsplit("/", 1)[0] for name in self.pruned if name.endswith("/acc")]
        return {task: f"{task}/acc_norm" if f"{task}/acc_norm" in self.pruned else f"{task}/acc" for task in tasks}


@dataclass(frozen=True)
class Row:
    """One figure of both models, as text."""

    figure: str
    dense: str
    pruned: str
    change: str

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """In the order of HEADER."""
        return self.figure, self.dense, self.pruned, self.change

    def to_dict(self) -> dict[str, str]:
        """By the names in HEADER."""
        return dict(zip(HEADER, self.cells, strict=True))


def rows(comparison: Comparison) -> list[Row]:
    """The dense-against-pruned table."""
    return [*_size_rows(comparison.pruning), *_quality_rows(comparison), *_speed_rows(comparison.bench)]


def _size_rows(pruning: PruneReport) -> list[Row]:
    before, after = pruning.parameters_before, pruning.parameters_after
    return [
        Row("Parameters", f"{before / 1e6:.1f} M", f"{after / 1e6:.1f} M", f"{after / before - 1:+.1%}"),
        Row("Projection parameters removed", "", f"{pruning.ratio:.2%}", f"asked {pruning.config.get('ratio', 0):.2%}"),
        Row(
            "Weight files",
            f"{pruning.bytes_before / 1e6:.1f} MB",
            f"{pruning.bytes_after / 1e6:.1f} MB",
            f"{pruning.bytes_after / pruning.bytes_before - 1:+.1%}",
        ),
    ]


def _quality_rows(comparison: Comparison) -> list[Row]:
    dense, pruned, found = comparison.dense, comparison.pruned, []
    if name := comparison.perplexity_name:
        text = name.rsplit("/", 1)[0]
        found.append(
            Row(
                f"Perplexity, {text}",
                f"{dense[name]:.2f}",
                f"{pruned[name]:.2f}",
                f"x {pruned[name] / dense[name]:.2f}",
            )
        )
    quoted = comparison.accuracies
    for task, name in quoted.items():
        points = 100 * (pruned[name] - dense[name])
        found.append(
            Row(
                f"{task} ({name.rsplit('/', 1)[1]})",
                _accuracy(dense, name),
                _accuracy(pruned, name),
                f"{points:+.1f} points",
            )
        )
    if len(quoted) > 1:
        means = [100 * statistics.mean(side[name] for name in quoted.values()) for side in (dense, pruned)]
        found.append(
            Row(
                f"Mean of {len(quoted)} tasks",
                f"{means[0]:.1f} %",
                f"{means[1]:.1f} %",
                f"{means[1] - means[0]:+.1f} points",
            )
        )
    return found


def _accuracy(metrics: dict[str, float], name: str) -> str:
    stderr = metrics.get(f"{name}_stderr")
    return f"{100 * metrics[name]:.1f} %" if stderr is None else f"{100 * metrics[name]:.1f} ± {100 * stderr:.1f} %"


def _speed_rows(bench: BenchReport | None) -> list[Row]:
    if bench is None:
        return []
    found = []
    for name, (label, unit, digits) in _BENCH_ROWS.items():
        dense, pruned = (statistics.median(run[name] for run in side) for side in (bench.dense, bench.pruned))
        ratio = bench.ratios[name]
        found.append(
            Row(
                label,
                f"{dense:.{digits}f} {unit}",
                f"{pruned:.{digits}f} {unit}",
                f"x {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
            )
        )
    dense, pruned = bench.start_seconds["dense"], bench.start_seconds["pruned"]
    found.append(Row("Server start", f"{dense:.0f} s", f"{pruned:.0f} s", ""))
    return found


def notes(comparison: Comparison) -> list[str]:
    """What the reader of the table must know: data, conditions, what was skipped."""
    pruning, bench = comparison.pruning, comparison.bench
    config = pruning.config
    lines = [
        f"Pruned in {pruning.seconds:.0f} s on {pruning.device}, peak memory {pruning.peak_memory_bytes / 1e9:.2f} GB.",
        f"Schedule {config.get('schedule')}, head unit {config.get('head_unit')}, seed {config.get('seed')}.",
        *comparison.data,
    ]
    if bench is not None:
        asked, machine = bench.config, bench.environment
        drift = "" if bench.drift is None else f"; the dense model measured again at the end: x {bench.drift:.2f}"
        lines.append(
            f"Benchmark: vLLM {machine['vllm']} on {machine['device']}, {machine['cores']} cores, {asked['dtype']}; "
            f"{asked['num_prompts']} requests of {asked['input_len']} + {asked['output_len']} tokens, "
            f"medians of {len(bench.dense)} runs, ratio (lowest to highest) of dense-pruned pairs{drift}."
        )
    return lines + [f"Skipped: {line}" for line in comparison.skipped]


def to_markdown(comparison: Comparison) -> str:
    """The report as markdown: table, notes, widths by layer."""
    lines = [f"# {comparison.title}: dense against pruned", "", _markdown_row(HEADER), "|---|---:|---:|---:|"]
    lines += [_markdown_row(row.cells) for row in rows(comparison)]
    lines += ["", *(f"- {note}" for note in notes(comparison)), "", "## Layers", ""]
    lines += [_markdown_row(LAYER_HEADER), "|" + "---:|" * len(LAYER_HEADER)]
    lines += [_markdown_row(cells) for cells in layer_cells(comparison.pruning)]
    return "\n".join(lines) + "\n"


LAYER_HEADER = ("layer", "heads", "kv heads", "FFN width", "removed", "attention error", "FFN error")


def layer_cells(pruning: PruneReport) -> list[tuple[str, ...]]:
    """The table of layers, as text."""
    return [
        (
            str(layer.layer),
            f"{layer.num_attention_heads} of {layer.dense_num_attention_heads}",
            f"{layer.num_key_value_heads} of {layer.dense_num_key_value_heads}",
            f"{layer.intermediate_size} of {layer.dense_intermediate_size}",
            f"{layer.ratio:.1%}",
            f"{layer.attention_error:.4f}",
            f"{layer.ffn_error:.4f}",
        )
        for layer in pruning.layers
    ]


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def to_html(comparison: Comparison) -> str:
    """The report as one self-contained page."""
    from jinja2 import Environment  # with matplotlib, half a second that only a report needs

    from deploy.plots import all_plots

    page: Any = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    text: str = page.render(
        title=comparison.title,
        base=comparison.pruning.base_model,
        header=HEADER,
        rows=[row.cells for row in rows(comparison)],
        notes=notes(comparison),
        plots=all_plots(comparison),
        layer_header=LAYER_HEADER,
        layers=layer_cells(comparison.pruning),
        versions=", ".join(f"{name} {number}" for name, number in comparison.pruning.versions.items()),
    )
    return text


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}: dense against pruned</title>
<style>
:root { color-scheme: light dark; --line: light-dark(#d9d9d9, #444); --soft: light-dark(#f5f5f5, #222); }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1280px; padding: 1rem;
  background: light-dark(#fff, #161616); color: light-dark(#1a1a1a, #e8e8e8); }
h1 { font-size: 1.5rem; line-height: 1.2; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: min(100%, 44rem); }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { background: var(--soft); }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; max-width: 560px; }
figcaption { font-size: .9rem; } li { overflow-wrap: anywhere; }
@media (max-width: 600px) { body { padding: .75rem; font-size: 15px; }
  th, td { padding: .25rem .35rem; font-size: .8rem; } }
</style>
</head>
<body>
<h1>{{ title }}: dense against pruned</h1>
<p>{{ base }}, pruned by SlimGPT.</p>
<div class="scroll"><table>
<thead><tr>{% for cell in header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in rows %}
<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<ul>
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
<h2>Figures</h2>
<div class="plots">
{% for plot in plots %}
<figure>{{ plot.svg|safe }}<figcaption>{{ plot.caption }}</figcaption></figure>
{% endfor %}
</div>
<h2>Layers</h2>
<details><summary>Widths and errors of all {{ layers|length }} layers</summary>
<div class="scroll"><table>
<thead><tr>{% for cell in layer_header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for cells in layers %}
<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div></details>
{% if versions %}<p><small>{{ versions }}</small></p>{% endif %}
</body>
</html>
"""
