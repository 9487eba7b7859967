"""Report the result: report.html and report.md in the run's folder, and the artifacts that the Prefect UI shows."""

from typing import Any

import yaml
from prefect import task
from prefect.cache_policies import NO_CACHE

from deploy.report.comparison import Comparison
from deploy.report.files import Report, write_report_files
from slimgpt.checkpoints.lineage import Lineage, Step
from slimgpt.evaluation.harness import EvalResult
from slimgpt.evaluation.metrics import documents
from slimgpt.evaluation.perplexity import ratio_interval
from slimgpt.files import portable
from tasks.environment import RunFolder
from tasks.preflight.request import LEFT_OUT
from tasks.registry.names import ALIAS
from tasks.steps.benchmarking import Benchmark


@task(name="report", cache_policy=NO_CACHE, persist_result=False)
def write_report(
    name: str,
    lineage: Lineage,
    dense_digest: str,
    dense: EvalResult | None,
    pruned: EvalResult | None,
    bench: Benchmark,
    parameters: dict[str, Any],
    folder: RunFolder,
    registered: bool = True,
) -> Report:
    """Write the report's files, each complete or not at all.

    Args:
        name: the report's title: the registered name, where it is registered.
        lineage: what was done to the pruned model.
        dense_digest: of the checkpoint that it is compared with.
        dense: the dense model's evaluation; None where it was left out.
        pruned: the pruned model's.
        bench: the benchmark, or why there is none.
        parameters: the flow's parameters, nested.
        folder: for the files.
        registered: whether the model will have a version and a bundle.
    """
    change = None
    if dense and pruned and dense.perplexity is not None and pruned.perplexity is not None:
        change = ratio_interval(dense.perplexity, pruned.perplexity)
    skipped = [] if dense and pruned else [f"evaluation: {LEFT_OUT}"]
    comparison = Comparison(
        title=name,
        lineage=lineage,
        dense=dense.metrics if dense else {},
        pruned=pruned.metrics if pruned else {},
        bench=bench.report,
        data=[
            *dict.fromkeys(_calibration(step) for step in lineage.steps),
            *([_evaluation(dense)] if dense else []),
        ],
        skipped=skipped + ([bench.skipped] if bench.skipped else []),
        perplexity_change=change,
        serve=[
            f"slimgpt serve models:/{name}@{ALIAS}",
            "# or on any machine with vLLM, from the folder of this run:",
            "bundle/serve.sh",
        ]
        if registered
        else ["slimgpt serve model  # in the folder of this run"],
        bench_failure=bench.failed,
        dense_digest=dense_digest,
        bos=pruned.config.get("bos", "none") if pruned else "",
        dtype=pruned.dtype if pruned else "",
        parameters=run_file(({"name": name} if registered else {}) | parameters),
    )
    return write_report_files(comparison, folder.report)


def run_file(parameters: dict[str, Any]) -> str:
    """The flow's parameters as a file for ``slimgpt compress --config``; of an absolute path only the last part."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item != ""}  # "" is the default of every text
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return portable(value) if isinstance(value, str) else value

    text: str = yaml.safe_dump(plain(parameters), sort_keys=False, width=100)
    return text


def _calibration(step: Step) -> str:
    facts = step.data
    origin = f" ({facts['origin']})" if "origin" in facts else ""
    use = facts.get("use", "calibration").capitalize()
    return f"{use}: {facts.get('name')}{origin}, {facts.get('num_samples')} x {facts.get('seq_len')} tokens."


def _evaluation(dense: EvalResult) -> str:
    limit = documents(dense.config.get("limit", 0))
    read = f"; {limit} of each task" if limit else ""
    blocks = ""
    if dense.perplexity is not None:
        blocks = f"; perplexity on {dense.perplexity.blocks} blocks of {dense.perplexity.seq_len} tokens"
    if (bos := dense.config.get("bos", "none")) != "none":
        blocks += f"; BOS before the {bos}"
    used = ", ".join(f"{text.name} ({text.origin})" for text in dense.texts)
    return f"Evaluation, {dense.dtype} on {dense.device}: {used}{read}{blocks}."
