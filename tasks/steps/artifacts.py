"""Show the result on the flow run's page: Prefect's artifacts."""

import base64
from pathlib import Path

from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from deploy.bench.results import BenchReport
from deploy.report.comparison import rows, to_markdown
from deploy.report.files import Report
from tasks.environment import is_server
from tasks.registry.names import RegisteredVersion


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
    if is_server(tracking_uri) and "@" not in tracking_uri:
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
