"""docs/reproduction.md: the paper's figures, and beside them what was measured."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from flows.paper.measured import Measured
from flows.paper.protocol import Measure, PaperRun, PaperTable, read_table, table_names
from slimgpt.files import write_atomically
from slimgpt.quantities import COUNTS, in_millions, read_quantity

HEAD = Path(__file__).with_name("head.md")


def write_page(path: Path, measured: Sequence[Measured]) -> None:
    """Write the page, complete or not at all; tables in the order of the paper."""
    tables = sorted((read_table(name) for name in table_names()), key=lambda table: _ORDER.index(table.name))
    sections = [_section(table, [one for one in measured if one.table == table.name]) for table in tables]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join([HEAD.read_text(), *sections]))


_ORDER = ["llama-7b", "llama-13b", "llama-30b", "vicuna-7b", "llama-2-7b", "baichuan-7b", "mistral-7b"]
_ORDER += ["ablations", "calibration", "samples", "lengths", "inference"]


def _section(table: PaperTable, measured: list[Measured]) -> str:
    own, others = [one for one in measured if one.own], [one for one in measured if not one.own]
    sources = list(dict.fromkeys(one.source for one in others))
    titles = {one.source: one.title.replace("|", "\\|") for one in others}
    head = ["ratio", "run", "figure", "paper", "others", "ours", "date", "device", "commit", *titles.values()]
    lines = [f"## {table.title}\n", f"`slimgpt reproduce {table.name}`; the paper's model is `{table.model}`.\n"]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    runs = [*table.runs, *table.further_runs()]
    for run in runs:
        for side in run.sides:
            here = [one for one in measured if (one.run, one.ratio, one.side) == (run.name, run.ratio, side)]
            for measure in table.measures:
                cells = _cells(run, side, measure, here, sources)
                if any(cells[3:]):
                    lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [
        _about([one for one in measured if one.source == source])
        for source in dict.fromkeys(m.source for m in measured)
    ]
    lines += _orders(table, own, others)
    lines += [f"- {remark}" for remark in table.remarks]
    return "\n".join(lines) + "\n"


def _cells(run: PaperRun, side: str, measure: Measure, here: list[Measured], sources: list[Any]) -> list[str]:
    title = run.title + (", recovered" if side == "recovered" else "")
    cells = [f"{run.ratio:.0%}" if run.ratio else "", title, measure.title]
    elsewhere = {who: sides[side] for who, sides in run.figures.items() if who != "paper" and side in sides}
    cells += [_shown(measure, run.figures.get("paper", {}).get(side, {}).get(measure.name))]
    cells += [", ".join(f"{_shown(measure, f[measure.name])} ({w})" for w, f in elsewhere.items() if measure.name in f)]
    of_own = [one for one in here if one.own and measure.name in one.figures]
    ours = max(of_own, key=lambda one: one.date, default=None)
    cells += [_shown(measure, ours.figures[measure.name]), ours.date, ours.device, ours.commit] if ours else [""] * 4
    by_source = {one.source: one.figures for one in here if not one.own}
    return cells + [_shown(measure, by_source.get(source, {}).get(measure.name)) for source in sources]


def _shown(measure: Measure, value: Any) -> str:
    if value is None:
        return ""
    if measure.name == "parameters":
        number = read_quantity(str(value), COUNTS, "parameters") if isinstance(value, str) else value
        return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{in_millions(number)} M"
    if measure.name == "seconds":
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _about(of_column: list[Measured]) -> str:
    """When and on what the figures of a column were measured."""
    dates = " to ".join(dict.fromkeys((min(one.date for one in of_column), max(one.date for one in of_column))))
    where = ", ".join(dict.fromkeys(f"{one.device}, {one.dtype}" for one in of_column))
    commits = ", ".join(dict.fromkeys(one.commit for one in of_column))
    versions = ", ".join(f"{name} {number}" for name, number in of_column[-1].versions.items())
    title = ("ours, " if of_column[0].own else "") + of_column[0].title
    return f"- *{title}*: {dates}, {where}, commit {commits}; {versions}."


def _orders(table: PaperTable, own: list[Measured], others: list[Measured]) -> list[str]:
    """What the paper's figures say of one run against another, and whether it holds for each model and ratio."""
    lines = []
    for order in table.orders:
        measure = next(one for one in table.measures if one.name == order["measure"])
        titles = {run.name: run.title for run in table.runs}
        best_first = ", ".join(titles[run] for run in order["rows"])
        lines.append(f"- Order in the paper, {order['says']}: {best_first}; the best first.")
        for (_, ratio), of_one in _grouped([*own, *others]).items():
            figures = {one.run: one.figures[measure.name] for one in of_one if measure.name in one.figures}
            values = [figures[run] for run in order["rows"] if run in figures]
            if len(values) < len(order["rows"]):
                continue
            pairs = list(pairwise(values))
            verdict = "holds" if all(better < worse for better, worse in pairs) else "does not hold"
            if len(set(values)) == 1:
                verdict = "no difference"
            shown = ", ".join(_shown(measure, value) for value in values)
            lines.append(f"  - {of_one[0].title}, {ratio:.0%}: {verdict} ({shown})")
    return lines


def _grouped(measured: list[Measured]) -> dict[tuple[Any, float], list[Measured]]:
    """By source and ratio, ordered."""
    groups: dict[tuple[Any, float], list[Measured]] = {}
    for one in sorted(measured, key=lambda one: (one.title, one.ratio)):
        groups.setdefault((one.source, one.ratio), []).append(one)
    return groups
