"""docs/results.md and its plot, from the figures of quality.py."""

import statistics
from pathlib import Path
from typing import Any

from slimgpt.files import write_atomically

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
HEAD = """# Quality: this project beside other methods

Written by `python -m benchmarks.quality`; `benchmarks/quality.json` holds the figures. Every method prunes the same dense model on
the same 32 sequences of 1024 tokens of C4 (seed 0). None is trained, except where the row says so.

- *Removed*: share of the decoder layers' projection parameters, counted the same way for all.
- *WikiText-2* (test split, 12 blocks) and *C4* (validation text, 24 blocks): perplexity of blocks of 1024 tokens, documents joined by
  EOS, the first token of a block not scored. Lower is better.
- *KL*: of the dense model's next-token distribution from the pruned one's, in nats per token, on 8 of those C4 blocks.
- *Tasks*: mean accuracy in percent (normalised by length where the task has it) of BoolQ, PIQA, HellaSwag, WinoGrande, ARC-e,
  ARC-c and OpenBookQA on the first documents of each, and its standard error.
- *Seconds*: of pruning on 2 CPU cores, rough.

The other methods are written from their papers' formulas (`benchmarks/baselines.py` says what each leaves out), so that only the
method differs. The authors' own code was measured on SmolLM2 as well, on the same tokens: at 25 % the best of it reached 53.0 on
WikiText-2 (Putri) and 57.1 on C4 (OSSCAR, in 12 blocks, where the dense model has 31.5). Held against that code on WikiText-2 at
25 %, these are not worse, but for FLAP, whose own code reached 63.1 there and 67.8 on C4, in 12 blocks.
"""  # noqa: E501


def write_page(rows: list[dict[str, Any]]) -> None:
    """Write the tables of all models and ratios, and a plot of each model that has several ratios."""
    parts = [HEAD]
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        of_model = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        dense = [row for row in of_model if row["method"] == "dense"]
        parts.append(f"## {model}, {dtype}\n")
        if len({row["ratio"] for row in of_model}) > 2:
            plot = PAGE.with_name(f"results-{model}-{dtype}.svg")
            _plot(of_model, plot)
            parts.append(f"![perplexity against the removed share, one line a method]({plot.name})\n")
        for ratio in sorted({row["ratio"] for row in of_model} - {0.0}):
            at_ratio = [row for row in of_model if row["ratio"] == ratio]
            parts.append(f"### {ratio:.0%}\n")
            parts.append(_table(dense + sorted(at_ratio, key=lambda row: -row["c4"])))
    write_atomically(PAGE, "\n".join(parts))


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | removed | WikiText-2 | C4 | KL | tasks | seconds |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        perplexities = [row["wikitext2"], row["c4"]]
        cells = [
            row["method"],
            f"{row['removed']:.1%}",
            *(f"{x:.2f}" if x < 1000 else f"{x:,.0f}" for x in perplexities),
        ]
        cells += [f"{row['kl']:.3f}", _tasks(row), f"{row['seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _tasks(row: dict[str, Any]) -> str:
    if "tasks" not in row:
        return ""
    values = list(row["tasks"].values())
    error = sum(stderr**2 for _, stderr in values) ** 0.5 / len(values)
    return f"{statistics.fmean(value for value, _ in values):.1f} ± {error:.1f} ({row['limit']} each)"


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against the removed share, one line for each method that was measured at all ratios."""
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "results", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    ratios = {row["ratio"] for row in rows} - {0.0}
    names = dict.fromkeys(row["method"] for row in rows if row["method"] != "dense")
    for axis, text, title in zip(axes, ("wikitext2", "c4"), ("WikiText-2", "C4"), strict=True):
        for name in names:
            points = sorted((row["removed"], row[text]) for row in rows if row["method"] in ("dense", name))
            if len(points) == len(ratios) + 1:
                axis.plot(*zip(*points, strict=True), "o-", label=name, linewidth=2.5 if "default" in name else 1)
        axis.set(title=title, xlabel="removed share of the projections", yscale="log", ylim=(20, 1000))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity")
    axes[1].legend(frameon=False, fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
