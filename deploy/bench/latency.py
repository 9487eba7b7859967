"""What heads and channels of a model take in vLLM on this machine, measured once and kept in the cache.

The model's config with other widths in every layer, and weights that the engine makes up, under ``vllm bench latency``:
the benchmark's requests as one batch, so prompts and answers weigh as they do there. The dense one comes first and
last: what the machine became slower or faster in between is taken out of the others, as a line.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.bench.config import MEASURED, BenchConfig, check_model, check_vocabulary
from deploy.bench.paired import environment
from deploy.bench.vllm_bench import batch_latency_ms
from deploy.engines.availability import model_obstacle, vllm_obstacle
from slimgpt.checkpoints.companions import copy_companions
from slimgpt.checkpoints.families import family_of, layer_shapes
from slimgpt.checkpoints.headers import CONFIG
from slimgpt.checkpoints.origins import read_config
from slimgpt.checkpoints.pruned_form import pruned_config
from slimgpt.checkpoints.source import cache_folder
from slimgpt.files import json_bytes, locked, write_atomically, writing
from slimgpt.method.latency import LatencyTable, probe_shapes
from slimgpt.method.shapes import LayerShape

logger = logging.getLogger(__name__)

_DRIFT = 0.1  # of the dense model's time from first to last that is worth a word


def known_latency(model: Path, config: BenchConfig) -> LatencyTable | None:
    """The table of a model's folder under this load, where it was measured on this machine before."""
    file = table_file(model, config)
    return read_latency(file) if file.is_file() else None


def read_latency(file: Path) -> LatencyTable:
    """A table that was written as JSON.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; `slimgpt latency MODEL --out {file}` writes it")
    try:
        return LatencyTable.from_dict(json.loads(file.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no table of `slimgpt latency` ({error}); remove it and measure again") from None


def measure_latency(model: Path, config: BenchConfig, on_progress: Callable[[str], None] | None = None) -> LatencyTable:
    """The table, from the cache or measured now, in an engine for each width: some minutes.

    Args:
        model: its folder; layers of equal widths.
        config: the requests; of its fields, those in MEASURED count.
        on_progress: is told of each width.

    Raises:
        ValueError: before anything starts: vLLM cannot run here or not with this model, the requests are too long,
            layers differ.
        ServerError: an engine did not do the work.
        OSError: the cache cannot be written.
    """
    if obstacle := vllm_obstacle() or model_obstacle(model):
        raise ValueError(f"speed cannot be measured here: {obstacle}")
    dense, file = layer_shapes(read_config(model)), table_file(model, config)
    if any(shape != dense[0] for shape in dense):
        raise ValueError(f"{model} has layers of different widths; milliseconds are measured where all are equal")
    check_model(model, replace(config, offline=False))
    check_vocabulary(model, "set a ratio instead of a speed")
    with writing("milliseconds", file.parent, "set SLIMGPT_CACHE to another folder"):
        file.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.parent, wait=True):  # two at once would measure each other
        if (known := known_latency(model, config)) is None:
            known = _measure(model, dense, config, on_progress or (lambda _: None))
            with writing("milliseconds", file.parent, "set SLIMGPT_CACHE to another folder"):
                write_atomically(file, json_bytes(known.to_dict()))
    return known


def _measure(model: Path, dense: list[LayerShape], config: BenchConfig, tell: Callable[[str], None]) -> LatencyTable:
    family = family_of(read_config(model))
    widths = [dense[0], *probe_shapes(dense[0], heads=family.prunes_heads), dense[0]]
    taken = []
    with tempfile.TemporaryDirectory() as scratch:
        for i, shape in enumerate(widths):
            folder = Path(scratch) / f"widths-{i}"
            _write(model, folder, [shape] * len(dense))
            result = Path(scratch) / f"{i}.json"
            taken.append(batch_latency_ms(folder, config, seed=config.seed, result=result))
            tell(
                f"{i + 1} of {len(widths)}: {shape.num_heads} heads, {shape.num_kv_heads} kv heads, FFN "
                f"{shape.intermediate_size} in every layer: {taken[-1]:,.0f} ms"
            )
    drift = taken[-1] / taken[0]
    if abs(drift - 1) > _DRIFT:
        logger.warning(
            "the dense model took %.0f ms at first and %.0f ms at last: other work beside it makes the table less sure",
            taken[0],
            taken[-1],
        )
    steady = [ms / (1 + (drift - 1) * i / (len(taken) - 1)) for i, ms in enumerate(taken)]
    load = {name: getattr(config, name) for name in MEASURED}
    measured = {"load": load, "environment": environment(), "drift": drift}
    probes = list(zip(widths[1:-1], steady[1:-1], strict=True))
    return LatencyTable.of(dense[0], len(dense), steady[0], probes, measured)


def _write(model: Path, folder: Path, shapes: list[LayerShape]) -> None:
    """The model with other widths and no weights."""
    folder.mkdir()
    copy_companions(model, folder)
    config = read_config(model)
    write_atomically(folder / CONFIG, json.dumps(pruned_config(config, family_of(config), shapes)))


def table_file(model: Path, config: BenchConfig) -> Path:
    """Where in the cache this model's table is, for these requests on this machine."""
    data = read_config(model).to_dict()
    facts: dict[str, Any] = {
        "model": {name: value for name, value in data.items() if name != "_name_or_path"},
        "load": {name: getattr(config, name) for name in MEASURED},
        "environment": environment(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return cache_folder() / "latency" / f"{key}.json"
