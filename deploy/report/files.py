"""The files of a report: report.html, report.md and the plots, each complete or not at all."""

from dataclasses import dataclass
from pathlib import Path

from deploy.report.comparison import Comparison, to_markdown
from deploy.report.page import to_html
from deploy.report.plots import all_plots
from slimgpt.files import write_atomically


@dataclass(frozen=True)
class Report:
    """The files of a report, and what they say."""

    comparison: Comparison
    html: Path
    markdown: Path
    plots: list[Path]


def write_report_files(comparison: Comparison, html: Path) -> Report:
    """Write ``html``, the Markdown file of the same name and the plots beside them."""
    markdown, plots = html.with_suffix(".md"), []
    write_atomically(markdown, to_markdown(comparison))
    write_atomically(html, to_html(comparison))
    for plot in all_plots(comparison):
        plots.append(html.parent / f"{plot.name}.svg")
        write_atomically(plots[-1], plot.svg + "\n")
    return Report(comparison, html, markdown, plots)
