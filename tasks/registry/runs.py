"""What the MLflow run of a compression is completed with, and its child run for each of the two models."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import RunTag

from deploy.report.files import Report
from slimgpt.checkpoints.lineage import LINEAGE
from slimgpt.evaluation.harness import EvalResult
from slimgpt.quantities import in_millions
from slimgpt.report import REPORT
from tasks.environment import RunFolder
from tasks.registry.config import RegistryConfig
from tasks.registry.live_run import PARENT, LiveRun, create_run
from tasks.registry.run_content import data_of, log, metrics_of, metrics_of_side, missing, source_tags, tags_of


@dataclass(frozen=True)
class RegistrationInput:
    """What one MLflow run is made of.

    Args:
        model: the pruned checkpoint's folder, as it is to be served.
        parameters: nested; flattened to ``prune.ratio`` and the like.
        dense, pruned: the evaluations; None where there is none.
        report: the report: its title is the registered name.
        folder: the run's folder: bench.json and evaluation-*.json go up with the report.
        config: where it goes.
        without_evaluation: whether the evaluation was left out on request.
    """

    model: Path
    parameters: dict[str, Any]
    dense: EvalResult | None
    pruned: EvalResult | None
    report: Report
    folder: RunFolder
    config: RegistryConfig = RegistryConfig()  # noqa: RUF009  frozen
    without_evaluation: bool = False

    @property
    def name(self) -> str:
        """Of the registered model."""
        return self.report.comparison.title

    @property
    def files(self) -> dict[str, list[Path]]:
        """Artifact folder -> local files."""
        facts = [self.model / REPORT]
        if (self.model / LINEAGE).is_file():  # not in a model from before there was a lineage
            facts.append(self.model / LINEAGE)
        for side, result in (("dense", self.dense), ("pruned", self.pruned)):
            if result is not None:
                facts.append(self.folder.root / f"evaluation-{side}.json")
        if self.report.comparison.bench is not None:  # else a file there is an older run's
            facts.append(self.folder.bench / "bench.json")
        return {"": [self.report.html, self.report.markdown, *facts], "plots": self.report.plots}

    @property
    def description(self) -> str:
        """One line for people."""
        lineage = self.report.comparison.lineage
        before, after = (in_millions(count("parameters")) for count in (lineage.before, lineage.after))
        return (
            f"{lineage.base_model} without {lineage.ratio:.1%} of its projection parameters ({before} M -> {after} M)."
        )


def record_run(run: LiveRun, request: RegistrationInput) -> None:
    """Complete the run: what is not logged yet, tags, data sets, files, and a child run for each model.

    It may be called again after a fault: what is there already is left alone. All stay open, see ``LiveRun.finish``.
    """
    client, run_id, comparison = run.client, run.run_id, request.report.comparison
    about = {**tags_of(comparison), "mlflow.note.content": request.description}
    client.log_batch(run_id, tags=[RunTag(key, text) for key, text in about.items()])
    log(client, run_id, {}, missing(client, run_id, metrics_of(comparison)))
    texts = request.dense.texts if request.dense else ()
    client.log_inputs(run_id, data_of(comparison.lineage, texts))
    info = client.get_run(run_id).info
    below = client.search_runs([info.experiment_id], f"tags.`{PARENT}` = '{run_id}'")
    sides = {child.data.tags.get("side"): child.info.run_id for child in below}
    evaluation = {name: value for name, value in request.parameters.items() if name in ("evaluation", "bench")}
    for side in ("dense", "pruned"):
        if side not in sides:
            tags = {**source_tags(), PARENT: run_id, "side": side, "base_model": comparison.lineage.base_model}
            sides[side] = create_run(client, info.experiment_id, f"{info.run_name} {side}", evaluation, tags)
        log(client, sides[side], {}, missing(client, sides[side], metrics_of_side(comparison, side)))
    for folder, files in request.files.items():
        for file in files:
            client.log_artifact(run_id, str(file), folder or None)


def parameters_of(**configs: Any) -> dict[str, Any]:
    """Dataclasses and plain values as one nested dict of parameters."""
    return {
        name: dataclasses.asdict(config)
        if dataclasses.is_dataclass(config) and not isinstance(config, type)
        else config
        for name, config in configs.items()
    }
