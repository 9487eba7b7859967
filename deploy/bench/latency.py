"""What heads and channels of a model take in vLLM on this machine, measured once and kept in the cache.

The model's config with other widths in every layer, and weights that the engine makes up, under ``vllm bench latency``:
the benchmark's requests as one batch, so prompts and answers weigh as they do there. The dense one comes first and
last: what the machine became slower or faster in between is taken out of the others, as a line. After an interruption
the dense one is measured again and the widths that are left: times count as shares of the dense model's.
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
from slimgpt.checkpoints.headers import CONFIG, read_json
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
    except (ValueError, TypeError, KeyError, AttributeError) as error:
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
            part = file.with_suffix(".part")
            try:
                known = _measure(model, dense, config, on_progress or (lambda _: None), part)
            except ValueError:  # what was measured makes no table: next time all of it is measured again
                part.unlink(missing_ok=True)
                raise
            _keep(file, known.to_dict())
            part.unlink(missing_ok=True)
    return known


def _measure(
    model: Path, dense: list[LayerShape], config: BenchConfig, tell: Callable[[str], None], part: Path
) -> LatencyTable:
    """Measure what ``part`` does not hold: there an interrupted measurement keeps what it has."""
    family = family_of(read_config(model))
    probes = probe_shapes(dense[0], heads=family.prunes_heads)
    shares = _read_part(part, len(probes))  # times, as shares of the dense model's first one in the same process
    left = [i for i in range(len(probes)) if i not in shares]
    if shares:
        tell(f"{len(shares)} of {len(probes)} widths were measured before an interruption")
    widths, taken = [dense[0], *(probes[i] for i in left), dense[0]], []
    with tempfile.TemporaryDirectory() as scratch:
        for n, shape in enumerate(widths):
            folder = Path(scratch) / f"widths-{n}"
            _write(model, folder, [shape] * len(dense))
            taken.append(batch_latency_ms(folder, config, seed=config.seed, result=Path(scratch) / f"{n}.json"))
            tell(
                f"{n + 1} of {len(widths)}: {shape.num_heads} heads, {shape.num_kv_heads} kv heads, FFN "
                f"{shape.intermediate_size} in every layer: {taken[-1]:,.0f} ms"
            )
            if 0 < n <= len(left):
                now = {left[k]: taken[k + 1] / taken[0] for k in range(n)}
                _keep(part, {str(i): share for i, share in {**shares, **now}.items()})
    drift = taken[-1] / taken[0]
    if abs(drift - 1) > _DRIFT:
        logger.warning(
            "the dense model took %.0f ms at first and %.0f ms at last: other work beside it makes the table less sure",
            taken[0],
            taken[-1],
        )
    load = {name: getattr(config, name) for name in MEASURED}
    measured = {"load": load, "environment": environment(), "drift": drift, "before_an_interruption": len(shares)}
    for n, i in enumerate(left, 1):
        shares[i] = taken[n] / taken[0] / (1 + (drift - 1) * n / (len(taken) - 1))
    return LatencyTable.of(
        dense[0], len(dense), taken[0], [(probe, shares[i] * taken[0]) for i, probe in enumerate(probes)], measured
    )


def _keep(file: Path, data: dict[str, Any]) -> None:
    with writing("milliseconds", file.parent, "set SLIMGPT_CACHE to another folder"):
        write_atomically(file, json_bytes(data))


def _read_part(part: Path, probes: int) -> dict[int, float]:
    try:
        shares = {int(i): float(share) for i, share in read_json(part).items()}
    except (OSError, ValueError, TypeError):  # none, or damaged: everything is measured
        return {}
    return shares if all(0 <= i < probes and share > 0 for i, share in shares.items()) else {}


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
