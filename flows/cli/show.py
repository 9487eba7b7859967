"""What the command line prints: rich tables on stdout, one format for people and one (JSON) for programs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from slimgpt.quantities import in_millions

out = Console(markup=False, emoji=False)  # names are the user's: [v1] is no style, and :cat: no picture


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is left-aligned, figures right."""
    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for cells in rows:
        shown.add_row(*map(str, cells))
    out.print(shown)


def line(text: str) -> None:
    """Print one line as it is: no markup, no wrapping, so that it can be copied."""
    out.print(text, highlight=False, soft_wrap=True)


def as_json(data: Any) -> None:
    """Print JSON for other programs."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def plan(planned: Any) -> None:
    """The dry run: what would happen."""
    rows = [
        (
            str(layer["layer"]),
            f"{layer['ratio']:.1%}",
            *(f"{layer['dense'][key]} -> {_span(layer['least'][key], layer['most'][key])}" for key in layer["dense"]),
        )
        for layer in planned.layers
    ]
    names = {"num_attention_heads": "heads", "num_key_value_heads": "kv heads", "intermediate_size": "FFN width"}
    table("planned widths", ("layer", "ratio", *(names.get(k, k) for k in planned.layers[0]["dense"])), rows)
    facts = planned.calibration
    for text in (
        f"model         {planned.model} ({planned.model_type}), {planned.dtype} on {planned.device}",
        f"ratio         {planned.ratio:.4f} of the projections, {planned.model_ratio:.4f} of the whole model",
        f"parameters    {planned.parameters_before:,} -> {planned.parameters_after:,}"
        + _at_most(planned.requested.get("parameters", 0)),
        f"weight files  {in_millions(planned.bytes_before)} MB -> {in_millions(planned.bytes_after)} MB"
        + _at_most(planned.requested.get("size", 0), "MB"),
        *([_speed(planned.predicted_speedup, asked)] if (asked := planned.requested.get("speedup", 0)) else []),
        f"calibration   {facts.get('name')}, {facts.get('tokens'):,} tokens",
        f"needs         about {planned.memory_bytes / 1e9:.1f} GB of memory, {planned.disk_bytes / 1e9:.2f} GB of disk",
        f"takes         about {planned.seconds:,.0f} s, from counted operations and the rate of one product just now",
    ):
        line(text)
    if planned.depends_on_data:
        line("widths        the calibration data decide within these bounds; --dry-run --measure gives the widths")
    elif planned.measured:
        line("widths        measured: pruning gives these")
    for missing in planned.missing:
        line(f"missing       {missing}")


def recovery_plan(planned: Any) -> None:
    """The dry run of a training."""
    facts = planned.text
    again = facts["tokens"] / different if (different := facts.get("different_tokens", 0)) else 1
    for text in (
        f"model         {planned.model}, {planned.dtype} on {planned.device}",
        *([f"teacher       {planned.teacher}"] if planned.teacher else []),
        f"trained       {planned.trained:,} parameters, for a model of {planned.parameters:,}; {planned.steps:,} steps",
        f"text          {facts['name']}, {facts.get('tokens', 0):,} tokens"
        + (f", each {again:.1f} times" if again > 1 else ""),
        f"needs         about {planned.memory_bytes / 1e9:.1f} GB of memory, {planned.disk_bytes / 1e9:.2f} GB of disk",
        f"takes         about {planned.seconds:,.0f} s, from counted operations and the rate of one product just now",
        *(f"missing       {missing}" for missing in planned.missing),
    ):
        line(text)


def quantization_plan(planned: Any) -> None:
    """The dry run of quantising."""
    for text in (
        f"model         {planned.model}, {planned.layers} layers",
        f"stored        {planned.format}" + (f" ({planned.remark})" if planned.remark else ""),
        f"weight files  {in_millions(planned.bytes_before)} MB -> {in_millions(planned.bytes_after)} MB",
        *([_text(planned.tokens.facts)] if planned.tokens else []),
        f"needs         about {planned.memory_bytes / 1e9:.1f} GB of memory, {planned.disk_bytes / 1e9:.2f} GB of disk",
        f"takes         about {planned.seconds:,.0f} s on 2 CPU cores",
        *(f"missing       {missing}" for missing in planned.missing),
    ):
        line(text)


def forecast(planned: Any) -> None:
    """The dry run of a compression or a sweep."""
    from tasks.preflight.forecast import HEADER

    table("what each stage would take", HEADER, [stage.cells for stage in planned.stages])
    left = f"{planned.disk_bytes / 1e9:.2f} GB still to be written" if planned.disk_bytes else "all was made before"
    line(f"disk          {left}")
    for folder in planned.folders:
        line(f"folder        {folder}")
    line("not counted   evaluation, benchmark and registration")


def _text(facts: dict[str, Any]) -> str:
    return f"calibration   {facts['name']}, {facts['tokens']:,} tokens"


def _span(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _speed(predicted: float, asked: float) -> str:
    return f"speed         x {predicted:.2f} by the table of milliseconds (x {asked:.2f} requested)"


def _at_most(most: float, unit: Literal["", "MB"] = "") -> str:
    """The budget behind the figure that was reached; empty where there was none."""
    if not most:
        return ""
    return f" (at most {in_millions(most)} MB requested)" if unit else f" (at most {most:,.0f} requested)"


def inspect(folder: Path) -> None:
    """Layers and totals of a checkpoint."""
    facts = checkpoint_facts(folder)
    if facts["pruned"]:
        from deploy.report.comparison import LAYER_HEADER, layer_cells, step_lines
        from slimgpt.checkpoints.lineage import load_lineage

        lineage = load_lineage(folder)
        table(f"{folder.name}: {lineage.base_model}, pruned", LAYER_HEADER, layer_cells(lineage))
        line(f"ratio         {lineage.ratio:.4f} of the projections, {lineage.model_ratio:.4f} of the whole model")
        parameters = _at_most(lineage.last_pruning("requested_parameters"))
        size = _at_most(lineage.last_pruning("requested_size"), "MB")
        line(f"parameters    {lineage.before('parameters'):,} -> {lineage.after('parameters'):,}{parameters}")
        line(
            f"weight files  {in_millions(lineage.before('bytes'))} MB -> {in_millions(lineage.after('bytes'))} MB{size}"
        )
        if asked := lineage.last_pruning("requested_speedup"):
            predicted = lineage.last_pruning("predicted_speedup")
            line(_speed(predicted, asked))
        for i, text in enumerate(step_lines(lineage), start=1):
            line(f"step {i}        {text}")
        return
    rows = [(str(layer["layer"]), *(str(layer[key]) for key in _WIDTHS)) for layer in facts["layers"]]
    table(f"{folder.name}: {facts['model_type']}, not pruned", ("layer", "heads", "kv heads", "FFN width"), rows)
    line(f"parameters    {facts['parameters']:,}")
    line(f"weight files  {in_millions(facts['bytes'])} MB")


_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """What ``inspect --json`` prints: pruning.json and the lineage, else what config.json and the file headers say.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it holds no model, or its weights are missing or cut short.
    """
    from slimgpt.checkpoints.headers import CONFIG, damaged, raw_config
    from slimgpt.checkpoints.lineage import check_parameters, load_lineage
    from slimgpt.checkpoints.weight_files import count_parameters, weight_files
    from slimgpt.report import REPORT, load_report

    config = raw_config(folder)
    lineage = load_lineage(folder)
    check_parameters(lineage, folder)
    if lineage.steps:
        report = load_report(folder).to_dict() if (folder / REPORT).is_file() else {}  # none where only trained
        return {"pruned": True, **report, "lineage": lineage.to_dict()}
    try:
        layers = _widths(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise damaged(folder / CONFIG, str(error)) from None
    return {
        "pruned": False,
        "model_type": config.get("model_type"),
        "parameters": count_parameters(folder),
        "bytes": sum((folder / name).stat().st_size for name in weight_files(folder)),
        "layers": layers,
    }


def _widths(config: dict[str, Any]) -> list[dict[str, Any]]:
    own = {int(i): widths for i, widths in (config.get("per_layer_config") or {}).items()}
    defaults = {"num_key_value_heads": config.get("num_attention_heads")}
    return [
        {"layer": i} | {key: own.get(i, {}).get(key, config.get(key, defaults.get(key))) for key in _WIDTHS}
        for i in range(config.get("num_hidden_layers", 0))
    ]
