"""``slimgpt serve | bench | latency | package``."""

import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from deploy.bench.config import MEASURED, BenchConfig
from deploy.serving.server import ServeConfig
from flows.cli.finding import check_new_file, check_new_folder, find
from flows.cli.flags import config_from, flags, given
from slimgpt.files import exists

_all: Any = Parameter(name="*")
ServeFlags = flags("ServeFlags", ServeConfig(port=8000), group="Serving", leave_out=("extra",))
BenchFlags = flags("BenchFlags", BenchConfig(), group="Benchmark")
_OTHERS = tuple(field.name for field in fields(BenchConfig) if field.name not in MEASURED)
LatencyFlags = flags("LatencyFlags", BenchConfig(), group="Requests", leave_out=_OTHERS)


def serve(
    model: str,
    *more: Annotated[str, Parameter(allow_leading_hyphen=True)],
    revision: str = "",
    runs: str = "",
    name: str = "",
    options: Annotated[ServeFlags, _all] = ServeFlags(),
) -> None:
    """Serve MODEL with vLLM until interrupted. vLLM's own options follow after --.

    The environment variable VLLM_API_KEY sets a key that requests must carry.

    Args:
        model: A folder, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        more: vLLM's own options, after --.
        revision: Commit or tag on the hub; empty for the newest.
        runs: Folder of the runs, whose registry holds MODEL; ./runs or SLIMGPT_RUNS by default.
        name: The model's name in requests; by default the name given as MODEL.
    """
    config = config_from(ServeConfig(port=8000), {**given(options), "extra": more})
    from deploy.engines.vllm_entry import die_with_parent
    from deploy.serving.foreground import serve_in_foreground
    from deploy.serving.server import API_KEY, check_port
    from flows.cli import show

    check_port(config.host, config.port)
    # In a child, since what finds a model (torch, MLflow) would keep half a gigabyte as long as the server runs.
    forking = get_context("fork")
    with ProcessPoolExecutor(1, mp_context=forking, initializer=die_with_parent, initargs=(os.getpid(),)) as child:
        folder, bos = child.submit(_find_servable, model, revision, runs, config.tensor_parallel_size).result()
    served = name or (folder.absolute().name if exists(model) and Path(model).is_dir() else model)
    key = (
        f"with the key in {API_KEY}" if os.environ.get(API_KEY) else f"without an API key; set {API_KEY} to require one"
    )
    show.line(f"serving {folder} as {served} on {config.host} {key}")
    if bos:
        show.line(f"the tokenizer lost the habit of adding BOS, without which this model reads badly: send {bos}PROMPT")

    def on_ready(url: str, seconds: float) -> None:
        show.line(f"ready on {url}/v1 as {served} after {seconds:.0f} s (Ctrl-C stops it)")

    if code := serve_in_foreground(folder, config, served_name=served, on_ready=on_ready):
        raise SystemExit(code)


def bench(
    dense: str,
    pruned: str,
    *,
    workdir: Path = Path("runs/bench"),
    record: bool = False,
    runs: str = "",
    options: Annotated[BenchFlags, _all] = BenchFlags(),
) -> None:
    """Measure PRUNED against DENSE with vLLM's own benchmark, in turn, on the same prompts.

    Args:
        dense: The model to compare with: a folder, a hub id, smollm2, or a registry's URI.
        pruned: The pruned model.
        workdir: Folder for bench.json, its plots and the logs.
        record: Add the figures to PRUNED, a version in the registry (models:/NAME/3), and to the run behind it.
        runs: Folder of the runs, whose registry holds the models; ./runs or SLIMGPT_RUNS by default.
    """
    config = config_from(BenchConfig(), given(options))
    check_new_folder(workdir)
    from deploy.bench.paired import compare
    from deploy.engines.availability import vllm_obstacle
    from deploy.report.comparison import HEADER, bench_note, bench_rows
    from deploy.report.plots import bench_plots
    from flows.cli import show
    from slimgpt.files import write_atomically

    if reason := vllm_obstacle():
        raise ValueError(reason)
    first, second = find(dense, "", runs), find(pruned, "", runs)
    if record:
        from tasks.environment import Workspace
        from tasks.registry.later_benchmark import find_version, record_benchmark

        version = find_version(pruned, first, second, Workspace.at(runs))  # an alias may move while it is measured
    report = compare(first, second, config, workdir=workdir, on_progress=lambda text: print(text, file=sys.stderr))
    show.table("pruned against dense", HEADER, [row.cells for row in bench_rows(report)])
    show.line(f"- {bench_note(report)}")
    written = ["bench.json"]
    for plot in bench_plots(report):
        written.append(f"{plot.name}.svg")
        write_atomically(workdir / written[-1], plot.svg + "\n")
    show.line(f"written to {workdir}: {', '.join(written)}")
    if record:
        record_benchmark(version, report, workdir, Workspace.at(runs))
        show.line(f"recorded in {version.name} version {version.version}")


def latency(
    model: str,
    *,
    revision: str = "",
    runs: str = "",
    out: Path | None = None,
    options: Annotated[LatencyFlags, _all] = LatencyFlags(),
) -> None:
    """Measure what MODEL's heads and FFN channels take in vLLM here: what prune --target-speedup spends.

    Seven engines start in turn, which takes minutes, on two CPU cores up to twenty; the table is kept in the cache.

    Args:
        model: A folder, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID.
        revision: Commit or tag on the hub; empty for the newest.
        runs: Folder of the runs, whose registry holds MODEL; ./runs or SLIMGPT_RUNS by default.
        out: Also write the table to this file, for prune --latency.
    """
    config = config_from(BenchConfig(), given(options))
    from deploy.bench.latency import measure_latency
    from deploy.engines.availability import vllm_obstacle
    from flows.cli import show
    from slimgpt.files import json_bytes, write_atomically

    if reason := vllm_obstacle():
        raise ValueError(reason)
    check_new_file(out)
    table = measure_latency(find(model, revision, runs), config, lambda text: print(text, file=sys.stderr))
    if out is not None:
        write_atomically(out, json_bytes(table.to_dict()))
    dense, layers_ms = table.shape, table.layers_us([table.shape] * table.layers) / 1000
    rows = [(f"FFN of {width} channels", f"{ms:.2f}") for width, ms in table.ffn_ms[1:]]
    if table.head_ms or table.kv_head_ms:
        rows += [("query head", f"{table.head_ms:.2f}"), ("kv head", f"{table.kv_head_ms:.2f}")]
    requests = f"{config.num_prompts} requests of {config.input_len} + {config.output_len} tokens"
    show.table(f"{model}: milliseconds of one layer, {requests} together", ("unit", "ms"), rows)
    show.line(
        f"all           {table.total_ms:,.0f} ms, of which {layers_ms:,.0f} in {table.layers} layers' heads and FFNs"
    )
    narrow = replace(dense, intermediate_size=dense.intermediate_size // 2)
    show.line(f"example       FFNs of half the width: x {table.speedup([narrow] * table.layers):.2f}")


def package(
    model: str,
    out: Path | None = None,
    *,
    revision: str = "",
    runs: str = "",
    name: str = "",
    image: str = "",
    verify: bool = False,
) -> None:
    """Make a bundle OUT that serves MODEL anywhere, or check one.

    Args:
        model: A folder, a hub id, smollm2 (built in), models:/NAME@alias or runs:/RUN_ID; with --verify, a bundle.
        out: A new folder for the bundle.
        revision: Commit or tag on the hub; empty for the newest.
        runs: Folder of the runs, whose registry holds MODEL; ./runs or SLIMGPT_RUNS by default.
        name: The model's name in requests to the server; by default the folder's, or the name on the hub or registry.
        image: Name of the container image, with the registry it is pushed to (ghcr.io/me/tiny); NAME by default.
        verify: Check every file of the bundle MODEL against its manifest.
    """
    from deploy.bundle.folder import verify_bundle, write_bundle
    from flows.cli import show

    if verify:
        if problems := verify_bundle(Path(model)):
            raise ValueError("; ".join(problems))
        show.line(f"{model} is complete and unchanged")
        return
    if out is None:
        raise ValueError("OUT is missing; name a new folder for the bundle, or use --verify")
    folder = find(model, revision, runs)
    bundle = write_bundle(folder, out, name=name or _served_name(model), image=image)
    show.line(f"written to {bundle}; start it with {bundle / 'serve.sh'}")


def _served_name(model: str) -> str:
    """What a packaged model is called in requests: its folder's name, its id on the hub, its name in the registry."""
    if exists(model) and Path(model).is_dir():
        return Path(model).absolute().name
    return re.sub(r"^\w+:/+", "", model).partition("@")[0]


def _find_servable(model: str, revision: str, runs: str, tensor_parallel_size: int) -> tuple[Path, str]:
    """The local folder of a model that vLLM can serve here so, and the BOS that its prompts have to begin with.

    What is missing is reported before a download.
    """
    from deploy.engines.availability import vllm_obstacle
    from deploy.engines.tensor_parallel import check_tensor_parallel, family_config
    from deploy.serving.server import check_servable
    from slimgpt.checkpoints.headers import raw_config
    from slimgpt.data.bos import lost_bos
    from slimgpt.data.calibration import load_tokenizer

    if reason := vllm_obstacle():
        raise ValueError(reason)
    folder = find(model, revision, runs)
    check_servable(folder)
    if tensor_parallel_size > 1 and (family := family_config(folder)):
        check_tensor_parallel(family, tensor_parallel_size)
    return folder, lost_bos(load_tokenizer(folder), raw_config(folder)["model_type"])
