"""What is run of a table, with which model, and how much of the paper's protocol."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deploy.bench.config import BenchConfig
from flows.paper.measured import Measured
from flows.paper.protocol import SPEED, Measure, PaperRun, PaperTable, evaluations
from slimgpt.config import EvalConfig, PruneConfig, RecoverConfig, check_limits, option
from slimgpt.quantities import COUNTS, read_quantity


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Which runs of a table, and how much of its protocol. The defaults are the paper's.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    only: tuple[str, ...] = option((), "Runs of the table, by the names of their files; empty: all.")
    measures: tuple[str, ...] = option((), "What is measured, by the names in measures.yaml; empty: all of the table.")
    samples_share: float = option(
        1.0, "Share of each run's calibration sequences, for trials on small models; 1 is the protocol.", gt=0, le=1
    )
    recovery_tokens: str = option(
        "", "Tokens of each recovery, such as 64k; empty, once through the instructions, is the protocol."
    )
    limit: int = option(
        0, "Documents of each task, and prompts where speed is measured; 0, all of them, is the protocol.", ge=0
    )
    max_blocks: int = option(0, "Blocks of each perplexity; 0, all, is the protocol.", ge=0)
    keep_models: bool = option(
        False, "Keep the pruned models in the folder of the runs; by default each goes when it is measured."
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")

    def __post_init__(self) -> None:
        object.__setattr__(self, "only", tuple(self.only))
        object.__setattr__(self, "measures", tuple(self.measures))
        check_limits(self)
        if self.recovery_tokens:
            read_quantity(self.recovery_tokens, COUNTS, "recovery_tokens")

    @property
    def complete(self) -> bool:
        """Whether it is the paper's protocol."""
        return self.protocol == (1, "", 0, 0)

    @property
    def protocol(self) -> tuple[float, str, int, int]:
        """What of the paper's protocol is cut short: part of what names a column of figures."""
        return self.samples_share, self.recovery_tokens, self.limit, self.max_blocks


@dataclass(frozen=True)
class Attempt:
    """One run of the paper, ready to be tried on a model.

    Attributes:
        table: whose run it is.
        own: whether the model is the paper's.
        run: of the paper, at the ratio that is tried.
        prune: None for the dense model.
        recover: None where it is not trained.
        measures: that are measured.
        evaluations: that they take, by name.
        bench: None where no speed is measured.
    """

    table: PaperTable
    own: bool
    run: PaperRun
    prune: PruneConfig | None
    recover: RecoverConfig | None
    measures: tuple[Measure, ...]
    evaluations: dict[str, EvalConfig]
    bench: BenchConfig | None

    @property
    def title(self) -> str:
        """For people, and of the MLflow run."""
        return f"{self.table.name}/{self.run.name}" + (f" {self.run.ratio:.0%}" if self.run.ratio else "")


def attempts_of(table: PaperTable, config: ReproduceConfig, parameters: int) -> list[Attempt]:
    """Everything that is to be run of a table.

    Args:
        table: of the paper.
        config: what of it.
        parameters: of the dense model: the paper's own model is pruned to the paper's sizes, others by its ratios.

    Raises:
        ValueError: for a run or a measure that the table does not have, or tokens of a training that it does not have.
    """
    own = table.is_own(parameters)
    measures = _chosen("measure", table.name, table.measures, config.measures)
    _chosen("run", table.name, table.runs, config.only)
    runs = [*table.runs, *([] if own else table.further_runs())]
    if config.recovery_tokens and not any(run.recover and run.ratio for run in runs):
        raise ValueError(
            f"recovery_tokens is {config.recovery_tokens!r}, and no run of the table {table.name} trains; leave it out"
        )
    parts = [table.known[name] for measure in measures for name in (measure.name, *measure.mean)]
    needs = {part.evaluation for part in parts if part.evaluation}
    configs = {
        name: dataclasses.replace(one, device=config.device)
        for name, one in evaluations(needs, config.limit, config.max_blocks, own).items()
    }
    bench = table.bench if any(measure.name in SPEED for measure in measures) else None
    if bench is not None and config.limit:
        bench = dataclasses.replace(bench, num_prompts=min(config.limit, bench.num_prompts))
    return [
        Attempt(
            table,
            own,
            run,
            dataclasses.replace(run.pruning(config.samples_share, own), device=config.device) if run.ratio else None,
            _training(run.recover, config) if run.recover and run.ratio else None,
            measures,
            configs,
            bench if run.ratio else None,
        )
        for run in runs
        if not config.only or run.name in config.only
    ]


def _training(recover: RecoverConfig, config: ReproduceConfig) -> RecoverConfig:
    tokens = config.recovery_tokens or recover.tokens
    return dataclasses.replace(recover, tokens=tokens, device=config.device)


def still_to_do(attempts: Sequence[Attempt], known: list[Measured], source: tuple[Any, ...]) -> list[Attempt]:
    """Those without all of their figures from this source: model and protocol, as of ``Measured``."""
    figures = {(one.table, one.run, one.ratio, one.side): one.figures.keys() for one in known if one.source == source}

    def lacks(attempt: Attempt, side: str) -> bool:
        place = attempt.table.name, attempt.run.name, attempt.run.ratio, side
        return not wanted_of(attempt, side) <= figures.get(place, set())

    return [attempt for attempt in attempts if any(lacks(attempt, side) for side in attempt.run.sides)]


def wanted_of(attempt: Attempt, side: str) -> set[str]:
    """Names of the figures that this side of a run is to have."""
    names = {measure.name for measure in attempt.measures}
    if side != "pruned":  # of the lineage's last step, and of the benchmark
        names -= {"seconds", "memory", *SPEED}
    return names


def _chosen(kind: str, table: str, known: Sequence[Any], names: tuple[str, ...]) -> tuple[Any, ...]:
    if unknown := [name for name in names if name not in [one.name for one in known]]:
        raise ValueError(
            f"{kind} {unknown[0]!r} is not in the table {table}; it has {', '.join(one.name for one in known)}"
        )
    return tuple(one for one in known if not names or one.name in names)
