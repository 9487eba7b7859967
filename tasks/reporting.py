"""Tell the result: report.html and report.md in the run's folder, and the artifacts that the Prefect UI shows."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from deploy.bench_report import BenchReport
from deploy.plots import all_plots
from deploy.report import Comparison, rows, to_markdown
from deploy.report_page import to_html
from slimgpt.files import write_atomically
from slimgpt.harness import EvalResult
from slimgpt.perplexity import ratio_interval
from slimgpt.report import PruneReport
from tasks.benchmarking import Benchmark
from tasks.environment import RunFolder
from tasks.registry import ALIAS, RegisteredVersion


@dataclass(frozen=True)
class Report:
    """The files of a report, and what they say."""

    comparison: Comparison
    html: Path
    markdown: Path
    plots: list[Path]


@task(name="report", cache_policy=NO_CACHE, persist_result=False)
def write_report(
    name: str,
    pruning: PruneReport,
    dense: EvalResult,
    pruned: EvalResult,
    bench: Benchmark,
    asked: dict[str, Any],
    folder: RunFolder,
    registered: bool = True,
) -> Report:
    """Write the report's files, each whole or not at all.

    Args:
        name: the report's title: the registered name, where it is registered.
        pruning: what pruning did.
        dense: the dense model's evaluation.
        pruned: the pruned model's.
        bench: the benchmark, or why there is none.
        asked: the flow's parameters, nested.
        folder: for the files.
        registered: whether the model will have a version and a bundle.
    """
    change = None
    if dense.perplexity is not None and pruned.perplexity is not None:
        change = ratio_interval(dense.perplexity, pruned.perplexity)
    comparison = Comparison(
        title=name,
        pruning=pruning,
        dense=dense.metrics,
        pruned=pruned.metrics,
        bench=bench.report,
        data=[line for line in (_calibration(pruning), _evaluation(dense)) if line],
        skipped=[bench.skipped] if bench.skipped else [],
        perplexity_change=change,
        serve=[
            f"slimgpt serve models:/{name}@{ALIAS}",
            "# or on any machine with vLLM, from the folder of this run:",
            "bundle/serve.sh",
        ]
        if registered
        else ["slimgpt serve model  # in the folder of this run"],
        parameters=run_file(({"name": name} if registered else {}) | asked),
    )
    markdown, plots = folder.report.with_suffix(".md"), []
    write_atomically(markdown, to_markdown(comparison))
    write_atomically(folder.report, to_html(comparison))
    for plot in all_plots(comparison):
        plots.append(folder.root / f"{plot.name}.svg")
        write_atomically(plots[-1], plot.svg + "\n")
    return Report(comparison, folder.report, markdown, plots)


def run_file(parameters: dict[str, Any]) -> str:
    """The flow's parameters as a file for ``slimgpt compress --config``; of an absolute path only the last part."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item != ""}  # "" is the default of every text
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    text: str = yaml.safe_dump(plain(parameters), sort_keys=False, width=100)
    return text


def _calibration(pruning: PruneReport) -> str:
    facts = pruning.calibration
    origin = f" ({facts['origin']})" if "origin" in facts else ""
    return f"Calibration: {facts.get('name')}{origin}, {facts.get('num_samples')} x {facts.get('seq_len')} tokens."


def _evaluation(dense: EvalResult) -> str:
    limit = dense.config.get("limit")
    documents = f"; first {limit} documents of each task" if limit else ""
    blocks = ""
    if dense.perplexity is not None:
        blocks = f"; perplexity on {dense.perplexity.blocks} blocks of {dense.perplexity.seq_len} tokens"
    used = ", ".join(f"{text.name} ({text.origin})" for text in dense.texts)
    return f"Evaluation, {dense.dtype} on {dense.device}: {used}{documents}{blocks}."


@task(name="show in the UI", cache_policy=NO_CACHE, persist_result=False)
def publish_artifacts(report: Report, version: RegisteredVersion, tracking_uri: str) -> None:
    """Markdown, table and plots for the flow run's page, and a link where there is an MLflow server."""
    registered = (
        f"\nRegistered as `{version.name}` version {version.version}, alias `{version.alias}`: `{version.uri}`.\n"
    )
    create_markdown_artifact(
        to_markdown(report.comparison) + registered, key="compress-report", description=version.name
    )
    create_table_artifact(
        [row.to_dict() for row in rows(report.comparison)], key="compress-figures", description=version.name
    )
    publish_images(report.plots, key="compress", description=version.name)
    if tracking_uri.startswith(("http:", "https:")) and "@" not in tracking_uri:
        link = f"{tracking_uri.rstrip('/')}/#/models/{version.name}/versions/{version.version}"
        create_link_artifact(link, link_text="the version in MLflow", key="compress-version")


def publish_images(plots: list[Path], key: str, description: str) -> None:
    """SVG files as images of the flow run's page; each one's key is ``key`` and the file's stem."""
    for plot in plots:
        image = "data:image/svg+xml;base64," + base64.b64encode(_on_white(plot.read_text()).encode()).decode()
        create_image_artifact(image, key=f"{key}-{plot.stem}", description=f"{description}: {plot.stem}")


def _on_white(svg: str) -> str:
    """An image has no page whose colours it could take."""
    return svg.replace("<svg ", '<svg style="background:#fff" ', 1)


def publish_benchmark(report: BenchReport, description: str) -> None:
    """The table that the page of a benchmark's flow run shows."""
    medians = report.metrics
    table = [
        {
            "figure": name,
            "dense": medians[f"dense/{name}"],
            "pruned": medians[f"pruned/{name}"],
            "ratio": ratio.median,
            "lowest": ratio.low,
            "highest": ratio.high,
        }
        for name, ratio in report.ratios.items()
    ]
    create_table_artifact(table, key="benchmark-figures", description=description)
