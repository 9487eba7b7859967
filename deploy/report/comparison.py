"""Dense against pruned, once: the rows that HTML, markdown, the UI's table and the terminal all show."""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from deploy.bench.results import SIDES, BenchReport, Footprint, Paired
from deploy.report.answers import answers_markdown
from slimgpt.checkpoints.lineage import Lineage
from slimgpt.evaluation.metrics import percent, quoted_metrics
from slimgpt.quantities import in_millions

HEADER = ("figure", "dense", "pruned", "change")
Z95 = 1.96  # standard errors to each side of a 95 % confidence interval

# bench metric of all requests at once -> (label, unit, digits)
_FULL_ROWS = {
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
# The same of a load below that, under its rate.
_LOAD_ROWS = {
    "p50_ttft_ms": ("time to first token, p50", "ms", 0),
    "p50_tpot_ms": ("time per further token, p50", "ms", 1),
    "p50_e2el_ms": ("whole request, p50", "ms", 0),
    "p95_e2el_ms": ("whole request, p95", "ms", 0),
    "p99_e2el_ms": ("whole request, p99", "ms", 0),
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that one compression measured.

    Args:
        title: the model's name in the registry.
        lineage: what was done to the pruned model, from the first dense one on.
        dense, pruned: flat evaluation metrics by name: ``wikitext2/perplexity``, ``piqa/acc``, ``piqa/acc_stderr``.
        bench: the benchmark, or None where it was skipped.
        data: one line per text or data set that was used.
        skipped: one line per step that was left out: why, and what would run it.
        perplexity_change: 95 % confidence interval of pruned over dense perplexity; None where there is none.
        serve: commands that serve the pruned model.
        parameters: the flow's parameters as a YAML file, with which the run can be repeated; "" where unknown.
        bench_failure: why the benchmark failed; empty where it did not.
        dense_digest: of the checkpoint that is compared with; "" for the one that the lineage begins from.
        bos: where BOS stood in the evaluation; "" where there was none.
        dtype: that the models were evaluated in; "" where they were not.
    """

    title: str
    lineage: Lineage
    dense: dict[str, float]
    pruned: dict[str, float]
    bench: BenchReport | None = None
    data: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    perplexity_change: tuple[float, float] | None = None
    serve: list[str] = field(default_factory=list)
    parameters: str = ""
    bench_failure: str = ""
    dense_digest: str = ""
    bos: str = ""
    dtype: str = ""

    @property
    def steps(self) -> Lineage:
        """What was done to the model that is compared with; it can be a pruned one itself."""
        return self.lineage.since(self.dense_digest)

    @property
    def perplexity_name(self) -> str:
        """The metric of the perplexity that was measured, or an empty string."""
        return next((name for name in self.pruned if name.endswith("/perplexity")), "")

    @property
    def accuracies(self) -> dict[str, str]:
        """Task -> the metric that is quoted for it."""
        return quoted_metrics(self.pruned)


@dataclass(frozen=True)
class Row:
    """One figure of both models, as text. ``group``: "size", "quality", "speed", "load" or "footprint"."""

    figure: str
    dense: str
    pruned: str
    change: str
    group: str

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """In the order of HEADER."""
        return self.figure, self.dense, self.pruned, self.change

    def to_dict(self) -> dict[str, str]:
        """By the names in HEADER."""
        return dict(zip(HEADER, self.cells, strict=True))


def rows(comparison: Comparison) -> list[Row]:
    """The dense-against-pruned table."""
    return [*_size_rows(comparison), *_quality_rows(comparison), *bench_rows(comparison.bench)]


def _size_rows(comparison: Comparison) -> list[Row]:
    lineage, steps = comparison.lineage, comparison.steps

    def change(name: str, unit: str) -> Row:
        before, after = steps.before(name), steps.after(name)
        label = "Parameters" if name == "parameters" else "Weight files"
        text = f"{after / before - 1:+.1%}"
        if most := steps.last_pruning(f"requested_{'size' if name == 'bytes' else name}"):
            text += f" (at most {in_millions(most)} {unit} requested)"
        return Row(label, f"{in_millions(before)} {unit}", f"{in_millions(after)} {unit}", text, "size")

    requested = f"requested {steps.requested_ratio:.2%}"
    if asked := steps.last_pruning("requested_speedup"):
        predicted = steps.last_pruning("predicted_speedup")
        requested = f"requested x {asked:.2f} as fast, predicted x {predicted:.2f}"
    removed = [Row("Projection parameters removed", "", f"{steps.ratio:.2%}", requested, "size")]
    if len(steps.steps) < len(lineage.steps):
        removed.append(Row(f"... of {lineage.base_model}", "", f"{lineage.ratio:.2%}", "", "size"))
    return [change("parameters", "M"), *removed, change("bytes", "MB")]


def _quality_rows(comparison: Comparison) -> list[Row]:
    dense, pruned, table = comparison.dense, comparison.pruned, []
    if name := comparison.perplexity_name:
        change, interval = f"x {pruned[name] / dense[name]:.2f}", comparison.perplexity_change
        change += f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
        before, after = (f"{side[name]:.2f}{_margin(side, name, '.2f')}" for side in (dense, pruned))
        table.append(Row(f"Perplexity, {name.rsplit('/', 1)[0]}", before, after, change, "quality"))
    quoted = comparison.accuracies
    for task, name in quoted.items():
        scale = percent(name, 1.0)
        before, after = (f"{scale * side[name]:.1f}{_margin(side, name, '.1f', scale)} %" for side in (dense, pruned))
        change = f"{scale * (pruned[name] - dense[name]):+.1f} points"
        table.append(Row(f"{task} ({name.rsplit('/', 1)[1]})", before, after, change, "quality"))
    if len(quoted) > 1:
        means = [statistics.mean(percent(name, side[name]) for name in quoted.values()) for side in (dense, pruned)]
        change = f"{means[1] - means[0]:+.1f} points"
        table.append(Row(f"Mean of {len(quoted)} tasks", f"{means[0]:.1f} %", f"{means[1]:.1f} %", change, "quality"))
    return table


def _margin(metrics: dict[str, float], name: str, form: str, scale: float = 1) -> str:
    stderr = metrics.get(f"{name}_stderr")
    return "" if stderr is None else f" ± {scale * Z95 * stderr:{form}}"


def bench_rows(bench: BenchReport | None) -> list[Row]:
    """The rows of a benchmark: all at once, each further load, offline runs, efficiency, what the servers took."""
    if bench is None:
        return []
    table = [_paired_row(bench.full, name, *text) for name, text in _FULL_ROWS.items()]
    for load in bench.loads[1:]:
        at = f"At {load.request_rate:.2g} requests/s: "
        for name, (label, unit, digits) in _LOAD_ROWS.items():
            table.append(dataclasses.replace(_paired_row(load.runs, name, at + label, unit, digits), group="load"))
    if bench.throughput:
        table.append(
            _paired_row(bench.throughput, "output_throughput", "Offline throughput, new tokens", "tokens/s", 0)
        )
    if bench.latency:
        table.append(_paired_row(bench.latency, "mean_latency_ms", "Offline, one request alone", "ms", 0))
    for name, saving in bench.savings.items():
        time, share = saving.time, saving.efficiency
        saved = f"{time.median:.1%} of {max(saving.operations, saving.bytes):.1%} possible"
        efficiency = f"efficiency {share.median:.2f} ({share.low:.2f} to {share.high:.2f})"
        table.append(Row(f"Time saved, {_SAVED[name]}", "", saved, efficiency, "speed"))
    return table + _footprint_rows(bench)


_SAVED = {"serving": "all at once", "throughput": "offline throughput", "latency": "one request alone"}


def _paired_row(runs: Paired, name: str, label: str, unit: str, digits: int) -> Row:
    ratio = runs.ratios[name]
    dense, pruned = (f"{runs.median(side, name):.{digits}f} {unit}" for side in SIDES)
    return Row(label, dense, pruned, f"x {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})", "speed")


def _footprint_rows(bench: BenchReport) -> list[Row]:
    texts: dict[str, Callable[[Footprint], str]] = {
        "Server start": lambda it: f"{it.start_seconds:.0f} s",
        "Loading the weights": lambda it: "" if it.load_seconds is None else f"{it.load_seconds:.2f} s",
        "Weight files served": lambda it: f"{in_millions(it.file_bytes)} MB",
        "Peak memory, KV cache included": lambda it: (
            "" if it.peak_memory_bytes is None else f"{it.peak_memory_bytes / 1e9:.2f} GB"
        ),
        "Tokens that fit the KV cache": lambda it: "" if it.kv_cache_tokens is None else f"{it.kv_cache_tokens:,}",
    }
    dense, pruned = (bench.footprints[side] for side in SIDES)
    fields = {"Weight files served": "file_bytes", "Peak memory, KV cache included": "peak_memory_bytes"}
    fields |= {"Tokens that fit the KV cache": "kv_cache_tokens"}
    table = []
    for label, text in texts.items():
        if not (text(dense) and text(pruned)):
            continue  # vLLM or the system did not say
        # Starts are one measurement each, and dense's is on colder caches: no ratio of those.
        name = fields.get(label)
        change = f"x {getattr(pruned, name) / getattr(dense, name):.2f}" if name else ""
        table.append(Row(label, text(dense), text(pruned), change, "footprint"))
    return table


def notes(comparison: Comparison) -> list[str]:
    """What the reader of the table must know: data, conditions, what was skipped."""
    bench = comparison.bench
    lines = [
        *step_lines(comparison.lineage),
        *comparison.data,
    ]
    if comparison.pruned:
        lines.append(
            "Accuracy and perplexity: ± and brackets are 95 % confidence intervals (over documents, over blocks)."
        )
    if bench is not None:
        lines.append(bench_note(bench))
    return lines + [f"Skipped: {line}" for line in comparison.skipped]


def step_lines(lineage: Lineage) -> list[str]:
    """One line per step: what was done to which model, and what it took."""
    return [
        f"{step.step} {step.model}: {step.summary}; {step.figures['seconds']:.0f} s on {step.device}, "
        f"peak memory {step.figures['peak_memory_bytes'] / 1e9:.2f} GB."
        for step in lineage.steps
    ]


def bench_note(bench: BenchReport) -> str:
    """Under what conditions a benchmark was made, in one line."""
    config, machine = bench.config, bench.environment
    drift = ", ".join(f"{_SAVED[name]} x {value:.2f}" for name, value in bench.drift.items())
    return (
        f"Benchmark: vLLM {machine['vllm']} on {bench.machine}, {config['dtype']}; "
        f"{config['num_prompts']} requests of {_prompts(bench)} + {config['output_len']} tokens, "
        f"medians of {len(bench.full.dense)} runs, ratio (lowest to highest) of dense-pruned pairs"
        + (f"; speed of the dense model measured again at the end: {drift}." if drift else ".")
    )


def _prompts(bench: BenchReport) -> str:
    config = bench.config
    if config.get("dataset_name", "random") == "random":
        return str(config["input_len"])
    mean = bench.full.median("dense", "total_input_tokens") / config["num_prompts"]
    return f"{mean:.0f} (mean; {config['dataset_name']}, {config['dataset_path']})"


def to_markdown(comparison: Comparison) -> str:
    """The report as markdown: table, notes, widths by layer."""
    lines = [f"# {comparison.title}: dense against pruned", "", _markdown_row(HEADER), "|---|---:|---:|---:|"]
    lines += [_markdown_row(row.cells) for row in rows(comparison)]
    lines += ["", *(f"- {note}" for note in notes(comparison)), ""]
    if comparison.serve:
        lines += ["## Serve", "", "```sh", *comparison.serve, "```", ""]
    if comparison.parameters:
        lines += ["## Reproduce", "", REPRODUCE, "", "```yaml", comparison.parameters.rstrip(), "```", ""]
    lines += answers_markdown(comparison.lineage)
    lines += ["## Layers", ""]
    lines += [_markdown_row(LAYER_HEADER), "|" + "---:|" * len(LAYER_HEADER)]
    lines += [_markdown_row(cells) for cells in layer_cells(comparison.lineage)]
    return "\n".join(lines) + "\n"


REPRODUCE = "Save as run.yaml, then: slimgpt compress --config run.yaml"
LAYER_HEADER = ("layer", "heads", "kv heads", "FFN width", "removed", "attention error", "FFN error")


def layer_cells(lineage: Lineage) -> list[tuple[str, ...]]:
    """The table of layers, as text: widths against the first model's, errors of the last pruning."""
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
        for layer in lineage.layers
    ]


def _markdown_row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
