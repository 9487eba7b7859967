"""``slimgpt reproduce``."""

from typing import Annotated, Any

from cyclopts import Parameter

from flows.cli.flags import config_from, flags, given
from flows.paper.attempts import ReproduceConfig

_all: Any = Parameter(name="*")
ReproduceFlags = flags("ReproduceFlags", ReproduceConfig(), group="Protocol")


def reproduce(
    table: str,
    *,
    model: str = "",
    dry_run: bool = False,
    page: str = "docs/reproduction.md",
    runs: str = "",
    options: Annotated[ReproduceFlags, _all] = ReproduceFlags(),
) -> None:
    """Run what TABLE of the paper has, and write its figures beside the paper's. Run it again to go on.

    Args:
        table: llama-7b, llama-13b, llama-30b, vicuna-7b, llama-2-7b, baichuan-7b, mistral-7b, ablations, calibration,
            samples, lengths or inference.
        model: The paper's model, or another one: a folder, a hub id, smollm2 (built in); the paper's from the hub by
            default.
        dry_run: Say what each run takes, and what is missing, and stop.
        page: The page that is written; the figures lie beside it, as .json.
        runs: Folder for the files of all runs; ./runs or SLIMGPT_RUNS by default.
    """
    config = config_from(ReproduceConfig(), given(options))
    from flows.paper.protocol import read_table
    from tasks.environment import prepare

    wanted = read_table(table)
    prepare(runs)
    if dry_run:
        _plan(wanted, model, config, runs)
        return
    from flows.cli import show
    from flows.prefect_api import reached
    from flows.reproduce import reproduce as flow

    with reached():
        measured = flow(table, model, config, page, runs)
    rows = [
        (
            f"{one.run} {one.ratio:.0%} {one.side}" if one.ratio else one.run,
            measure.title,
            f"{one.figures[measure.name]:,.2f}",
        )
        for one in measured
        for measure in wanted.measures
        if measure.name in one.figures
    ]
    show.table(f"{wanted.title}: {measured[0].title if measured else ''}", ("run", "figure", "measured"), rows)
    show.line(f"page         {page}")


def _plan(table: Any, model: str, config: ReproduceConfig, runs: str) -> None:
    from flows.cli import show
    from flows.cli.finding import find
    from flows.paper.attempts import attempts_of
    from flows.paper.cost import cost_of, tokens_read
    from slimgpt.checkpoints.weight_files import count_parameters

    folder = find(model or table.model, "", runs)
    attempts = attempts_of(table, config, count_parameters(folder))
    tokens, missing = tokens_read(attempts[0].evaluations)
    costs = [cost_of(attempt, folder, config.device, tokens) for attempt in attempts]
    rows = [
        (attempt.title, f"{cost.seconds:,.0f}", f"{cost.memory / 1e9:.1f}", f"{cost.disk / 1e9:.2f}")
        for attempt, cost in zip(attempts, costs, strict=True)
    ]
    show.table(f"{table.title}: {folder.name}", ("run", "seconds", "GB of memory", "GB of disk"), rows)
    show.line("seconds of pruning, training and evaluation (no benchmark), counted, at this device's rate just now")
    missing = list(dict.fromkeys([*missing, *(line for cost in costs for line in cost.missing)]))
    for line in missing:
        show.line(f"missing      {line}")
    if missing:
        raise ValueError("; ".join(missing))
