"""``slimgpt``: prune, inspect, eval, compress, serve, bench, package. Flags come from the configs.

A user's mistake ends in one line and exit code 2.
What a sub-command needs is imported when it runs: ``--help`` answers at once.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter

from flows.flags import config_from, flags, given, light_imports, read_config_file

with light_imports("slimgpt", "deploy"):
    from deploy.benchmark import BenchConfig
    from deploy.serving import ServeConfig
    from flows.defaults import BENCH, EVALUATION, PRUNE
    from slimgpt.config import EvalConfig, PruneConfig

USER_ERROR = 2
app = App(
    name="slimgpt",
    help="Structured pruning of LLaMA-family models: prune, measure, register, serve.",
    version_flags=["--version"],
)

_all: Any = Parameter(name="*")
PruneFlags = flags("PruneFlags", PruneConfig(), group="Pruning")
EvalFlags = flags("EvalFlags", EvalConfig(), group="Evaluation")
ServeFlags = flags("ServeFlags", ServeConfig(port=8000), group="Serving", leave_out=("extra",))
BenchFlags = flags("BenchFlags", BenchConfig(), group="Benchmark")
CompressPrune = flags("CompressPrune", PRUNE, group="Pruning")
CompressEval = flags("CompressEval", EVALUATION, group="Evaluation", prefix="evaluation.")
CompressBench = flags("CompressBench", BENCH, group="Benchmark", prefix="bench.")


@app.command
def prune(
    model: str,
    out: Path,
    *,
    revision: str = "",
    dry_run: bool = False,
    options: Annotated[PruneFlags, _all] = PruneFlags(),
) -> None:
    """Prune MODEL into the folder OUT. Run it again to go on after an interruption.

    Args:
        model: A folder, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        out: A new folder for the pruned model.
        revision: Commit or tag on the hub; empty for the newest.
        dry_run: Say what would happen, and what is missing, and stop.
    """
    config = config_from(PruneConfig(), given(options))
    from flows import show
    from slimgpt.plan import plan

    folder = _find(model, revision)
    if dry_run:
        planned = plan(folder, config, out)
        show.plan(planned)
        if planned.missing:
            raise ValueError("; ".join(planned.missing))
        return
    from tqdm import tqdm

    from slimgpt.pruner import prune as run

    bars: list[Any] = []  # made with the first layer: a refusal before it shows no bar

    def on_layer(layer: Any, layers: int) -> None:
        if not bars:
            bars.append(tqdm(total=layers, unit="layer", desc="prune", file=sys.stderr))
        bars[0].set_postfix_str(f"FFN {layer.intermediate_size}, error {layer.ffn_error:.4f}", refresh=False)
        bars[0].update(layer.layer + 1 - bars[0].n)

    run(folder, out, config, on_layer=on_layer)
    for bar in bars:
        bar.close()
    show.inspect(out)
    show.line(f"written to    {out}")


@app.command
def inspect(folder: Path, *, json: bool = False) -> None:
    """Show heads, kv heads, FFN width and error of each layer, and the totals.

    Args:
        folder: A model's folder, pruned or not.
        json: Print JSON for other programs.
    """
    from flows import show

    show.as_json(show.checkpoint_facts(folder)) if json else show.inspect(folder)


@app.command(name="eval")
def evaluate(
    model: str, *, revision: str = "", out: Path | None = None, options: Annotated[EvalFlags, _all] = EvalFlags()
) -> None:
    """Measure perplexity and lm-eval tasks of MODEL.

    Args:
        model: A folder, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        revision: Commit or tag on the hub; empty for the newest.
        out: Also write all results as JSON to this file.
    """
    config = config_from(EvalConfig(), given(options))
    from flows import show
    from slimgpt.files import write_atomically
    from slimgpt.harness import evaluate as run

    if out is not None and not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {out} does not exist; make it first")
    result = run(_find(model, revision), config, on_progress=lambda text: print(text, file=sys.stderr))
    rows = []
    for name, value in result.metrics.items():
        if not name.endswith("_stderr"):
            stderr = result.metrics.get(f"{name}_stderr")
            rows.append((name, f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}"))
    show.table(f"{model}: {result.dtype} on {result.device}", ("metric", "value", "stderr"), rows)
    limit = f"the first {config.limit} documents of each task" if config.limit else "all documents"
    show.line(
        f"data: {', '.join(f'{text.name} ({text.origin})' for text in result.texts)}; {limit}; {result.seconds:.0f} s"
    )
    if out is not None:
        write_atomically(out, json.dumps(result.to_dict(), indent=2) + "\n")


@app.command
def compress(
    *,
    config: str = "",
    model: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    runs: str | None = None,
    prune: Annotated[CompressPrune, _all] = CompressPrune(),
    evaluation: Annotated[CompressEval, _all] = CompressEval(),
    bench: Annotated[CompressBench, _all] = CompressBench(),
) -> None:
    """Prune, evaluate, package, benchmark, register and report: the whole way, as one Prefect flow.

    Args:
        config: A YAML file of the flow's parameters (model, name, revision, runs, prune, evaluation, bench). Flags win.
        model: A folder, a hub id, smollm2 (built in, the default), models:/NAME@alias or runs:/RUN_ID.
        name: Name in the registry; the model's own name and -slim by default.
        revision: Commit or tag on the hub.
        runs: Folder for the files of all runs; ./runs or SLIMGPT_RUNS by default.
    """
    sections = {"prune": PRUNE, "evaluation": EVALUATION, "bench": BENCH}
    chosen = {"prune": given(prune), "evaluation": given(evaluation), "bench": given(bench)}
    plain = {"model": model, "name": name, "revision": revision, "runs": runs}
    file = read_config_file(config, sections, tuple(plain)) if config else {}
    parameters: dict[str, Any] = {key: str(value) for key, value in file.items() if key in plain}
    parameters |= {key: value for key, value in plain.items() if value is not None}
    parameters |= {key: config_from(sections[key], file.get(key, {}), chosen[key]) for key in sections}
    from tasks.environment import prepare

    prepare(parameters.get("runs", ""))
    from deploy.report import HEADER, notes, rows
    from flows import show
    from flows.compress import compress as flow

    done = flow(**parameters)
    comparison, version = done.report.comparison, done.version
    show.table(f"{version.name}: dense against pruned", HEADER, [row.cells for row in rows(comparison)])
    for note in notes(comparison):
        show.line(f"- {note}")
    show.line(f"report       {done.report.html}")
    show.line(f"registered   {version.name} version {version.version}, alias {version.alias}")
    show.line(
        f"serve it     slimgpt serve {version.uri}"
        + (f" --runs {parameters['runs']}" if parameters.get("runs") else "")
    )


@app.command
def serve(
    model: str,
    *more: Annotated[str, Parameter(allow_leading_hyphen=True)],
    runs: str = "",
    name: str = "",
    options: Annotated[ServeFlags, _all] = ServeFlags(),
) -> None:
    """Serve MODEL with vLLM until interrupted. vLLM's own options follow after --.

    Args:
        model: A folder, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        more: vLLM's own options, after --.
        runs: Folder of the runs, whose registry holds MODEL; ./runs or SLIMGPT_RUNS by default.
        name: The model's name in requests; by default the name it was asked for by.
    """
    config = config_from(ServeConfig(port=8000), {**given(options), "extra": more})
    from deploy.serving import check_port, check_servable, child_environment, serve_command
    from deploy.vllm_entry import PARENT_PID
    from flows import show

    folder = _find(model, "", runs)
    check_servable(folder)
    port = check_port(config.host, config.port)
    served = name or (folder.name if Path(model).is_dir() else model)
    show.line(f"serving {folder} as {served} on http://{config.host}:{port}/v1 (interrupt to stop)")
    command = serve_command(folder.absolute(), config, port=port, served_name=served)
    environment = child_environment(config)
    del environment[PARENT_PID]  # it becomes this process, and does not have it as a parent to die with
    # vLLM takes this process's place: signals, exit code and terminal are its own.
    os.execve(command[0], command, environment)


@app.command
def bench(
    dense: str, pruned: str, *, workdir: Path = Path("runs/bench"), options: Annotated[BenchFlags, _all] = BenchFlags()
) -> None:
    """Measure PRUNED against DENSE with vLLM's own benchmark, in turn, on the same prompts.

    Args:
        dense: The model to compare with: a folder, a hub id, smollm2, or a registry's URI.
        pruned: The pruned model.
        workdir: Folder for bench.json and the logs.
    """
    config = config_from(BenchConfig(), given(options))
    from deploy.availability import vllm_available
    from deploy.benchmark import compare
    from flows import show

    if reason := vllm_available():
        raise ValueError(reason)
    folders = [_find(dense, ""), _find(pruned, "")]
    report = compare(*folders, config, workdir=workdir, on_progress=lambda text: print(text, file=sys.stderr))
    medians = report.metrics
    rows = [
        (
            metric,
            f"{medians[f'dense/{metric}']:.2f}",
            f"{medians[f'pruned/{metric}']:.2f}",
            f"{r.median:.3f} ({r.low:.3f} to {r.high:.3f})",
        )
        for metric, r in report.ratios.items()
    ]
    show.table("pruned against dense", ("metric", "dense", "pruned", "ratio (lowest to highest)"), rows)
    show.line(f"written to {workdir / 'bench.json'}")


@app.command
def package(model: str, out: Path | None = None, *, name: str = "", verify: bool = False) -> None:
    """Make a bundle OUT that serves MODEL anywhere, or check one.

    Args:
        model: A model as elsewhere; with --verify, a bundle's folder.
        out: A new folder for the bundle.
        name: The model's name in requests to the server; the folder's by default.
        verify: Check every file of the bundle MODEL against its manifest.
    """
    from deploy.bundle import verify_bundle, write_bundle
    from flows import show

    if verify:
        if problems := verify_bundle(Path(model)):
            raise ValueError("; ".join(problems))
        show.line(f"{model} is whole")
        return
    if out is None:
        raise ValueError("OUT is missing; name a new folder for the bundle, or use --verify")
    folder = _find(model, "")
    bundle = write_bundle(folder, out, name=name or (out.name if folder.name == "model" else folder.name))
    show.line(f"written to {bundle}; start it with {bundle / 'serve.sh'}")


def _find(model: str, revision: str, runs: str = "") -> Path:
    """The local folder of a model; MLflow is imported only where a URI asks for it."""
    from tasks.environment import prepare

    workspace = prepare(runs)
    import slimgpt  # noqa: F401  registers the model classes

    if model.startswith(("models:", "runs:")):
        from tasks.registry import fetch_model

        return fetch_model(model, workspace)
    from slimgpt.source import resolve_model

    return resolve_model(model, revision=revision)


def _fail(message: str, code: int = USER_ERROR) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Run the command line. A user's mistake ends in one line and exit code 2, a fault of ours in a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for ours in ("slimgpt", "deploy"):  # raised damping, a server that takes its time: worth a line
        logging.getLogger(ours).setLevel(logging.INFO)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant: an object instead of a name
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(f"{error} (see slimgpt {' '.join(sys.argv[1:2])} --help)")
    except (ValueError, OSError) as error:
        if os.environ.get("SLIMGPT_TRACEBACK"):
            raise
        _fail(str(error) or type(error).__name__)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


if __name__ == "__main__":
    main()
