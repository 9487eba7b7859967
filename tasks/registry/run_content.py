"""What the MLflow run of a compression holds: tags, parameters, metrics, data sets, files, one child run per model."""

import getpass
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

import slimgpt
from deploy.bench.results import BenchReport
from deploy.report.comparison import Comparison
from slimgpt.checkpoints.lineage import Lineage
from slimgpt.evaluation.harness_tasks import DataUsed
from slimgpt.files import portable
from slimgpt.report import LayerReport

_LAYER_METRICS = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "attention_error",
    "ffn_error",
    "ratio",
    "seconds",
)
_TOTALS = (
    "ratio",
    "model_ratio",
    "seconds",
    "peak_memory_bytes",
)
_SIZES = ("parameters", "bytes")
FAILURE = "benchmark_failure"  # tag: why the benchmark failed
SETTING = "bench."  # of parameters, and of the tags of a version that was measured later


def tags_of(comparison: Comparison) -> dict[str, str]:
    """What one looks for: ratio, base model, perplexity, speed-up, device, versions."""
    lineage, last = comparison.lineage, comparison.lineage.steps[-1]
    tags = {"ratio": f"{lineage.ratio:.4f}", "base_model": lineage.base_model, "device": last.device}
    tags |= {"steps": lineage.names, "dense_model": comparison.steps.base_model}
    if name := comparison.perplexity_name:
        tags |= {"perplexity": f"{comparison.pruned[name]:.4f}", "perplexity_data": name.rsplit("/", 1)[0]}
    if comparison.bos:
        tags |= {"bos": comparison.bos, "dtype": comparison.dtype}
    if not comparison.pruned:
        tags["evaluation"] = "skipped"
    if comparison.bench is None:
        tags["benchmark"] = "skipped"
    else:
        tags |= bench_tags(comparison.bench)
    if comparison.bench_failure:
        tags |= {"benchmark": "failed", FAILURE: comparison.bench_failure[:500]}
    versions = {"slimgpt": slimgpt.__version__, "mlflow": mlflow.__version__, **last.versions}
    return tags | {f"version.{name}": number for name, number in versions.items()}


def bench_tags(bench: BenchReport) -> dict[str, str]:
    """What one looks for in a benchmark: the speed-up, and what it was measured on."""
    speedup = f"{bench.ratios['output_throughput'].median:.4f}"
    return {"benchmark": "measured", "speedup": speedup, "bench_machine": bench.machine}


def source_tags(flow: str = "flows.compress") -> dict[str, str]:
    """What MLflow's own client sets on a run: who, from what, at which commit."""
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": flow}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        tags["mlflow.user"] = "unknown"
    if made_by := commit():
        tags["mlflow.source.git.commit"] = made_by
    return tags


def commit(folder: Path = Path(slimgpt.__file__).parents[1]) -> str:
    """The commit of a checkout; an installed package has none. Only ``folder`` itself counts, not what it lies in."""
    if not (folder / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def data_of(lineage: Lineage, texts: tuple[DataUsed, ...]) -> list[DatasetInput]:
    """Every text and data set, with its digest and what it was used for."""
    read = [step.data for step in lineage.steps if step.data]
    used = [
        *dict.fromkeys(
            (data["name"], data["sha256"], data.get("origin", ""), data.get("use", "calibration")) for data in read
        )
    ]
    used += [(text.name, text.sha256, text.origin, "evaluation") for text in texts]
    return [_dataset(*item) for item in used]


def _dataset(name: str, sha256: str, origin: str, context: str) -> DatasetInput:
    # MLflow keeps 36 characters of a digest; data from the hub has a revision of its own and none
    source = json.dumps({"origin": origin, "sha256": sha256})
    dataset = Dataset(
        name=name, digest=sha256[:36] or "none", source_type=origin.replace(" ", "_") or "local", source=source
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def flat(parameters: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"prune": {"ratio": 0.25}}`` -> ``{"prune.ratio": "0.25"}``; of absolute paths only the last parts."""
    flattened: dict[str, str] = {}
    for key, value in parameters.items():
        if isinstance(value, dict):
            flattened |= flat(value, f"{prefix}{key}.")
        else:
            many = isinstance(value, tuple | list)
            text = str([portable(x) if isinstance(x, str) else x for x in value]) if many else portable(str(value))
            flattened[f"{prefix}{key}"] = text[:6000]
    return flattened


def metrics_of(comparison: Comparison) -> list[Metric]:
    """Figures of both models, and those of each layer by step."""
    sides = (("dense", comparison.dense), ("pruned", comparison.pruned))
    evaluations = [metric for side, measured in sides for metric in evaluation_metrics(side, measured)]
    pruning = pruning_metrics(comparison.steps, comparison.lineage)
    return [*pruning, *evaluations, *bench_metrics(comparison.bench)]


def pruning_metrics(steps: Lineage, lineage: Lineage) -> list[Metric]:
    """Totals of these steps, and the figures of each layer after the whole lineage."""
    figures = {f"pruning/{name}": float(getattr(steps, name)) for name in _TOTALS}
    for name in _SIZES:
        figures |= {f"pruning/{name}_before": steps.before(name), f"pruning/{name}_after": steps.after(name)}
    return [*_at_once(figures), *(metric for layer in lineage.layers for metric in layer_metrics(layer))]


def layer_metrics(layer: LayerReport, prefix: str = "") -> list[Metric]:
    """Figures of one layer, whose number is MLflow's step."""
    now = int(time.time() * 1000)
    return [Metric(f"{prefix}layer/{name}", float(getattr(layer, name)), now, layer.layer) for name in _LAYER_METRICS]


def training_metrics(step: int, measured: dict[str, float], prefix: str = "") -> list[Metric]:
    """The loss of the training's text and of the held-out text, in nats per token, and the learning rate."""
    now = int(time.time() * 1000)
    names = {"loss": "loss", "eval_loss": "held_out_loss", "learning_rate": "learning_rate"}
    return [Metric(f"{prefix}recovery/{names[key]}", measured[key], now, step) for key in names if key in measured]


def evaluation_metrics(side: str, figures: dict[str, float]) -> list[Metric]:
    """What was measured of the dense or the pruned model."""
    return _at_once({f"{side}/{name}": value for name, value in figures.items()})


def bench_metrics(bench: BenchReport | None) -> list[Metric]:
    """The benchmark's figures; none where there was none."""
    return _at_once(_bench(bench))


def bench_metrics_of_side(bench: BenchReport | None, side: str) -> list[Metric]:
    """The benchmark's figures of the dense or the pruned model."""
    return _at_once(_bench_of_side(bench, side))


def metrics_of_side(comparison: Comparison, side: str) -> list[Metric]:
    """Figures of one model, under the same names for both, so that MLflow can set the runs beside each other."""
    figures = dict(comparison.dense if side == "dense" else comparison.pruned)
    figures |= _bench_of_side(comparison.bench, side)
    size = comparison.steps.before if side == "dense" else comparison.steps.after
    figures |= {name: size(name) for name in _SIZES}
    return _at_once(figures)


def _bench(bench: BenchReport | None) -> dict[str, float]:
    return {f"bench/{name}": value for name, value in bench.metrics.items()} if bench is not None else {}


def _bench_of_side(bench: BenchReport | None, side: str) -> dict[str, float]:
    own = f"bench/{side}/"
    return {f"bench/{name.removeprefix(own)}": v for name, v in _bench(bench).items() if name.startswith(own)}


def _at_once(figures: dict[str, float]) -> list[Metric]:
    now = int(time.time() * 1000)
    return [Metric(name, float(value), now, 0) for name, value in figures.items()]


def missing(client: MlflowClient, run_id: str, metrics: list[Metric]) -> list[Metric]:
    """Those that the run does not have yet: what was logged on the way, or by an earlier try, is not logged twice."""
    latest = client.get_run(run_id).data.metrics
    known = {(name, 0) for name in latest}
    by_step = {metric.key for metric in metrics if metric.step and metric.key in latest}
    for name in by_step:
        known.discard((name, 0))
        known |= {(name, metric.step) for metric in client.get_metric_history(run_id, name)}
    return [metric for metric in metrics if (metric.key, metric.step) not in known]


def log(client: MlflowClient, run_id: str, params: dict[str, str], metrics: list[Metric]) -> None:
    """Parameters, which cannot be changed once written, and metrics, in as many requests as MLflow's limits ask for."""
    entries = [Param(name, value) for name, value in params.items()]
    for start in range(0, len(entries), 100):
        client.log_batch(run_id, params=entries[start : start + 100])
    for start in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[start : start + 1000])
