"""Tell the result: report.html and report.md in the run's folder, and the artifacts that the Prefect UI shows."""

from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from deploy.plots import all_plots
from deploy.report import Comparison, rows, to_html, to_markdown
from slimgpt.files import write_atomically
from slimgpt.harness import EvalResult
from slimgpt.report import PruneReport
from tasks.benchmarking import Benchmark
from tasks.environment import RunFolder
from tasks.registry import RegisteredVersion


@dataclass(frozen=True)
class Report:
    """The files of a report, and what they say."""

    comparison: Comparison
    html: Path
    markdown: Path
    plots: list[Path]


@task(name="report", cache_policy=NO_CACHE, persist_result=False)
def write_report(
    name: str, pruning: PruneReport, dense: EvalResult, pruned: EvalResult, bench: Benchmark, folder: RunFolder
) -> Report:
    """Write the report's files, each whole or not at all."""
    comparison = Comparison(
        title=name,
        pruning=pruning,
        dense=dense.metrics,
        pruned=pruned.metrics,
        bench=bench.report,
        data=[line for line in (_calibration(pruning), _evaluation(dense)) if line],
        skipped=[bench.skipped] if bench.skipped else [],
    )
    markdown, plots = folder.report.with_suffix(".md"), []
    write_atomically(markdown, to_markdown(comparison))
    write_atomically(folder.report, to_html(comparison))
    for plot in all_plots(comparison):
        plots.append(folder.root / f"{plot.name}.svg")
        write_atomically(plots[-1], plot.svg + "\n")
    return Report(comparison, folder.report, markdown, plots)


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
    """The markdown and the table that the flow run's page shows, and a link where there is an MLflow server."""
    registered = (
        f"\nRegistered as `{version.name}` version {version.version}, alias `{version.alias}`: `{version.uri}`.\n"
    )
    create_markdown_artifact(
        to_markdown(report.comparison) + registered, key="compress-report", description=version.name
    )
    create_table_artifact(
        [row.to_dict() for row in rows(report.comparison)], key="compress-figures", description=version.name
    )
    if tracking_uri.startswith(("http:", "https:")) and "@" not in tracking_uri:
        link = f"{tracking_uri.rstrip('/')}/#/models/{version.name}/versions/{version.version}"
        create_link_artifact(link, link_text="the version in MLflow", key="compress-version")
