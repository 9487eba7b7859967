"""``slimgpt prune | inspect | eval``."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from flows.cli.finding import check_new_file, check_new_folder, find, preset_layers
from flows.cli.flags import config_from, flags, given
from slimgpt.config import EvalConfig, PruneConfig

_all: Any = Parameter(name="*")
PruneFlags = flags("PruneFlags", PruneConfig(), group="Pruning")
EvalFlags = flags("EvalFlags", EvalConfig(), group="Evaluation")


def prune(
    model: str,
    out: Path,
    *,
    revision: str = "",
    dry_run: bool = False,
    measure: bool = False,
    preset: Literal["best", "paper"] | None = None,
    latency: Path | None = None,
    options: Annotated[PruneFlags, _all] = PruneFlags(),
) -> None:
    """Prune MODEL into the folder OUT. Run it again to resume after an interruption.

    On several GPUs, or CPUs: torchrun --nproc-per-node=N -m slimgpt prune MODEL OUT ...

    Args:
        model: A folder, a GGUF file, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        out: A new folder for the pruned model.
        revision: Commit or tag on the hub; empty for the newest.
        dry_run: Say what would happen, and what is missing, and stop.
        measure: With --dry-run: decide all widths, from prices or in the time that pruning takes, and write nothing.
        preset: paper sets what the flags do not to the paper's method: its head scores, budgets, ratios by layer and
            calibration (256 x 2048 tokens of C4); best to what measured best, which is the default.
        latency: With --target-speedup: a table that `slimgpt latency` wrote, for other requests or another machine. By
            default it is measured here, once.
    """
    config = config_from(PruneConfig(), *preset_layers(preset, given(options)))
    if measure and not dry_run:
        raise ValueError(
            "--measure belongs to --dry-run: without it the model is pruned, and the report has the widths"
        )
    if latency and not config.target_speedup:
        raise ValueError(f"--latency is {latency}, and no --target-speedup is given, which alone uses it")
    from flows.cli.interrupts import listening

    with listening() as interrupts:
        from slimgpt.engine.ranks import joined

        with joined(config.device) as ranks:
            interrupts.alone = ranks.count == 1
            for turn in (True, False):  # the first process fetches, the others find what it fetched
                with ranks.together():
                    if ranks.first is turn:
                        folder = find(model, revision)
            table = ranks.from_first(lambda: _milliseconds(folder, out, config, latency, dry_run=dry_run))
            if not dry_run:
                _prune(folder, out, config, table, ranks, interrupts)
            elif ranks.first:
                _plan(folder, out, config, table, measure, interrupts)


def _milliseconds(folder: Path, out: Path, config: Any, file: Path | None, *, dry_run: bool) -> Any:
    """The table that a target in speed spends; None where there is no such target, or a dry run finds none."""
    if not config.target_speedup:
        return None
    from deploy.bench.config import BenchConfig
    from deploy.bench.latency import known_latency, measure_latency, read_latency
    from slimgpt.engine.plan import plan

    if file is not None:
        return read_latency(file)
    if dry_run:
        return known_latency(folder, BenchConfig())
    checked = plan(folder, replace(config, target_speedup=0.0), out, estimate_seconds=False)
    if checked.missing:
        raise ValueError("; ".join(checked.missing))
    return measure_latency(folder, BenchConfig(), lambda text: print(f"latency {text}", file=sys.stderr))


def _plan(folder: Path, out: Path, config: Any, latency: Any, measure: bool, interrupts: Any) -> None:
    from flows.cli import show
    from slimgpt.engine.plan import plan

    interrupts.kept = "nothing was written"
    with _progress("measure", interrupts) as (on_layer, on_priced):
        planned = plan(folder, config, out, latency=latency, measure=measure, on_layer=on_layer, on_priced=on_priced)
    show.plan(planned)
    if planned.missing:
        raise ValueError("; ".join(planned.missing))


def _prune(folder: Path, out: Path, config: Any, latency: Any, ranks: Any, interrupts: Any) -> None:
    from flows.cli import show
    from slimgpt.engine.pruner import prune as run

    with _progress("prune", interrupts, shown=ranks.first) as (on_layer, on_priced):
        run(folder, out, config, latency=latency, on_layer=on_layer, on_priced=on_priced)
    if ranks.first:
        show.inspect(out)
        show.line(f"written to    {out}")


@contextmanager
def _progress(
    name: str, interrupts: Any, *, shown: bool = True
) -> Iterator[tuple[Callable[[Any, int], None], Callable[[int, int], None]]]:
    """Bars on stderr for the layers and for their prices; each is made with its first layer: a refusal shows none."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def move(desc: str, done: int, layers: int, words: str = "") -> None:
        if shown:
            bar = bars.get(desc)
            if bar is None:
                bar = bars[desc] = tqdm(total=layers, unit="layer", desc=desc, file=sys.stderr)
            bar.set_postfix_str(words, refresh=False)
            bar.update(done - bar.n)
            if done == layers:
                bar.close()  # before the next one is drawn

    def on_layer(layer: Any, layers: int) -> None:
        move(name, layer.layer + 1, layers, f"FFN {layer.intermediate_size}, error {layer.ffn_error:.4f}")
        interrupts.unit_done(layer.layer + 1, layers)

    def on_priced(done: int, layers: int) -> None:
        move("prices", done, layers)
        interrupts.unit_done(0, layers)

    try:
        yield on_layer, on_priced
    finally:
        for bar in bars.values():
            bar.close()


def inspect(folder: Path, *, json: bool = False, plots: Path | None = None) -> None:
    """Show heads, kv heads, FFN width and error of each layer, and the totals.

    Args:
        folder: A model's folder, pruned or not.
        json: Print JSON for other programs.
        plots: Also write widths.svg and errors.svg, by depth, into this folder.
    """
    from flows.cli import show

    check_new_folder(plots)
    if plots is not None:
        from deploy.report.plots import layer_plots
        from slimgpt.files import write_atomically
        from slimgpt.report import load_report

        layers = load_report(folder).layers
        plots.mkdir(parents=True, exist_ok=True)
        for plot in layer_plots(layers):
            write_atomically(plots / f"{plot.name}.svg", plot.svg + "\n")
    show.as_json(show.checkpoint_facts(folder)) if json else show.inspect(folder)


def evaluate(
    model: str, *, revision: str = "", out: Path | None = None, options: Annotated[EvalFlags, _all] = EvalFlags()
) -> None:
    """Measure perplexity and lm-eval tasks of MODEL.

    Args:
        model: A folder, a GGUF file, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        revision: Commit or tag on the hub; empty for the newest.
        out: Also write all results as JSON to this file.
    """
    config = config_from(EvalConfig(), given(options))
    from flows.cli import show
    from slimgpt.evaluation.harness import evaluate as run
    from slimgpt.evaluation.metrics import documents
    from slimgpt.files import write_atomically

    check_new_file(out)
    result = run(find(model, revision), config, on_progress=lambda text: print(text, file=sys.stderr))
    rows = []
    for name, value in result.metrics.items():
        if not name.endswith("_stderr"):
            stderr = result.metrics.get(f"{name}_stderr")
            rows.append((name, f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}"))
    show.table(f"{model}: {result.dtype} on {result.device}", ("metric", "value", "stderr"), rows)
    limit = f"{documents(config.limit)} of each task" if config.limit else "all documents"
    show.line(
        f"data: {', '.join(f'{text.name} ({text.origin})' for text in result.texts)}; {limit}; {result.seconds:.0f} s"
    )
    if out is not None:
        write_atomically(out, json.dumps(result.to_dict(), indent=2) + "\n")
