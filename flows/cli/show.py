"""What the command line prints: rich tables on stdout, one format for people and one (JSON) for programs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

out = Console()


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
    out.print(text, markup=False, highlight=False, soft_wrap=True)


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
        f"parameters    {planned.parameters_before:,} -> {planned.parameters_after:,}",
        f"weight files  {planned.bytes_before / 1e6:,.1f} MB -> {planned.bytes_after / 1e6:,.1f} MB",
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


def _span(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def inspect(folder: Path) -> None:
    """Layers and totals of a checkpoint."""
    facts = checkpoint_facts(folder)
    if facts["pruned"]:
        from deploy.report.comparison import LAYER_HEADER, layer_cells, step_lines
        from slimgpt.checkpoints.lineage import load_lineage

        lineage = load_lineage(folder)
        table(f"{folder.name}: {lineage.base_model}, pruned", LAYER_HEADER, layer_cells(lineage))
        line(f"ratio         {lineage.ratio:.4f} of the projections, {lineage.model_ratio:.4f} of the whole model")
        line(f"parameters    {lineage.before('parameters'):,} -> {lineage.after('parameters'):,}")
        line(f"weight files  {lineage.before('bytes') / 1e6:,.1f} MB -> {lineage.after('bytes') / 1e6:,.1f} MB")
        for i, text in enumerate(step_lines(lineage), start=1):
            line(f"step {i}        {text}")
        return
    rows = [(str(layer["layer"]), *(str(layer[key]) for key in _WIDTHS)) for layer in facts["layers"]]
    table(f"{folder.name}: {facts['model_type']}, not pruned", ("layer", "heads", "kv heads", "FFN width"), rows)
    line(f"parameters    {facts['parameters']:,}")
    line(f"weight files  {facts['bytes'] / 1e6:,.1f} MB")


_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """What ``inspect --json`` prints: pruning.json and the lineage, else what config.json and the file headers say.

    Raises:
        FileNotFoundError: when the folder holds no model.
        ValueError: when its weights are missing or cut short.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; name the folder of a model")
    if (folder / "pruning.json").is_file():
        from slimgpt.checkpoints.lineage import load_lineage
        from slimgpt.report import load_report

        return {"pruned": True, **load_report(folder).to_dict(), "lineage": load_lineage(folder).to_dict()}
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors weights; is the download or prune complete?")
    parameters = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  not a dict
                    size = 1
                    for length in tensors.get_slice(name).get_shape():
                        size *= length
                    parameters += size
        except SafetensorError as error:
            raise ValueError(f"{file} is incomplete ({error}); fetch or make it again") from None
    config = json.loads((folder / "config.json").read_text())
    own = {int(i): widths for i, widths in (config.get("per_layer_config") or {}).items()}
    defaults = {"num_key_value_heads": config.get("num_attention_heads")}
    layers = [
        {"layer": i} | {key: own.get(i, {}).get(key, config.get(key, defaults.get(key))) for key in _WIDTHS}
        for i in range(config.get("num_hidden_layers", 0))
    ]
    size = sum(file.stat().st_size for file in files)
    return {
        "pruned": False,
        "model_type": config.get("model_type"),
        "parameters": parameters,
        "bytes": size,
        "layers": layers,
    }
