"""The report as one self-contained HTML page: no script, no network, light and dark."""

from pathlib import Path
from typing import Any

from deploy.report.answers import answers_of
from deploy.report.comparison import HEADER, LAYER_HEADER, REPRODUCE, Comparison, layer_cells, notes, rows
from slimgpt.quantities import in_millions

GROUPS = {
    "size": "What was pruned",
    "quality": "What it costs: quality",
    "speed": "What it gains: speed",
    "footprint": "What it takes to serve",
}
PLOTS = {"widths": "size", "errors": "size", "accuracy": "quality"}  # the others show speed


def to_html(comparison: Comparison) -> str:
    """The report as one page."""
    # With matplotlib, half a second that only a report needs.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from deploy.report.plots import all_plots

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    table, plots, lineage = rows(comparison), all_plots(comparison), comparison.lineage
    sections: list[dict[str, Any]] = [
        {
            "title": title,
            "rows": [row.cells for row in table if row.group == group],
            "more": [row.cells for row in table if row.group == "load"] if group == "speed" else [],
            "plots": [plot for plot in plots if PLOTS.get(plot.name, "speed") == group],
        }
        for group, title in GROUPS.items()
    ]
    text: str = environment.get_template("report.html.j2").render(
        title=comparison.title,
        base=lineage.base_model,
        ratio=f"{lineage.ratio:.1%}",
        steps=lineage.names,
        tiles=_tiles(comparison),
        header=HEADER,
        sections=[section for section in sections if section["rows"]],
        notes=notes(comparison),
        serve=comparison.serve,
        reproduce=REPRODUCE,
        parameters=comparison.parameters,
        answers=answers_of(lineage),
        layer_header=LAYER_HEADER,
        layers=layer_cells(lineage),
        versions=", ".join(f"{name} {number}" for name, number in lineage.steps[-1].versions.items()),
    )
    return text


def _tiles(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The few figures that most readers came for: label, figure, what it is compared with."""
    steps, bench = comparison.steps, comparison.bench
    before, after = steps.before("parameters"), steps.after("parameters")
    tiles = [("Parameters", f"{after / before - 1:+.1%}", f"{in_millions(before)} M to {in_millions(after)} M")]
    if bench is not None:
        ratio = bench.ratios["output_throughput"]
        tiles.append(("Throughput", f"x {ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f} over the pairs"))
    if name := comparison.perplexity_name:
        dense, pruned = comparison.dense[name], comparison.pruned[name]
        tiles.append(
            ("Perplexity", f"x {pruned / dense:.2f}", f"{dense:.2f} to {pruned:.2f}, {name.rsplit('/', 1)[0]}")
        )
    quoted = comparison.accuracies.values()
    if quoted:
        means = [
            100 * sum(side[name] for name in quoted) / len(quoted) for side in (comparison.dense, comparison.pruned)
        ]
        what = f"{means[0]:.1f} % to {means[1]:.1f} %, mean of {len(quoted)}"
        tiles.append(("Accuracy, points", f"{means[1] - means[0]:+.1f}", what))
    return tiles
