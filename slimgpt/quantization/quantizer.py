"""Store a model's weights in fewer bits, by llm-compressor, for vLLM and transformers.

slimgpt quantize pruned out --scheme w4a16
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save_file

from slimgpt.checkpoints.companions import copy_companions
from slimgpt.checkpoints.headers import CONFIG, INDEX, raw_config, read_json
from slimgpt.checkpoints.lineage import LINEAGE, Checkpoint, Step
from slimgpt.checkpoints.pruned_form import config_sha256
from slimgpt.checkpoints.stage_folder import check_out, refuse_other_folder
from slimgpt.checkpoints.weight_files import weight_files
from slimgpt.config import QuantizeConfig
from slimgpt.data.calibration import Calibration
from slimgpt.device import device_name, dtype_name
from slimgpt.files import commit, digest_of, file_sha256, json_bytes, locked, scratch, share, write_atomically, writing
from slimgpt.quantization.job import QuantizationJob, worker_environment
from slimgpt.quantization.packages import locked_versions, missing_packages, packages_folder
from slimgpt.report import REPORT

RUN = "quantization.json"
COMMAND = "slimgpt quantize"
MADE = "quantizing"  # folder in OUT, gone when it is a model
LOG = "quantize.log"  # in OUT, where it failed
OnLayer = Callable[[int, int], None]


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantizeConfig,
    *,
    tokens: Calibration | None = None,
    on_layer: OnLayer | None = None,
) -> Checkpoint:
    """Write the model in folder ``model`` in fewer bits into the new folder ``out``; its widths stay.

    The decoder's projections are quantised, embeddings and output head stay as they are. A run that was interrupted
    starts again from the first layer.

    Args:
        model: a dense or pruned checkpoint in full precision.
        out: where the quantised checkpoint goes.
        config: how.
        tokens: calibration tokens to use instead of those that ``config.calibration`` names.
        on_layer: called with the number of finished layers, and how many there are.

    Raises:
        ValueError: for a model or config that cannot be quantised, or missing packages, before long work; when
            llm-compressor fails, with what it said.
        FileNotFoundError: when the text is not found.
        FileExistsError: when ``out`` holds something else, or a run that differs; the message names what differs.
        BlockingIOError: when another process writes to ``out``.
        OSError: when the disk is too small.
    """
    out = Path(out).absolute()
    refuse_other_folder(out, RUN, COMMAND)
    job = QuantizationJob(Path(model), config)
    tokens = (tokens or job.calibration()) if config.reads_text else None
    header = check_quantized_out(out, job, tokens)
    if (out / CONFIG).is_file():
        return Checkpoint.open(out)
    if missing := missing_packages():
        raise ValueError(missing)
    job.check_space(out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out), writing("the quantised model", out):
        if (out / CONFIG).is_file():  # another process made it in the meantime
            return Checkpoint.open(out)
        write_atomically(out / RUN, json_bytes({"run": header}))
        shutil.rmtree(out / MADE, ignore_errors=True)
        (out / MADE).mkdir()
        start = time.perf_counter()
        result = _run_worker(job, tokens, out, on_layer)
        _publish(job, out, _step(job, tokens, result, time.perf_counter() - start))
    return Checkpoint.open(out)


def check_quantized_out(out: Path, job: QuantizationJob, tokens: Calibration | None) -> dict[str, Any]:
    """Refuse a folder that holds something else than this run: a FileExistsError, as ``check_out`` raises.

    Returns:
        What the run depends on, bit for bit.
    """
    header = {"model": job.source.digest, **job.facts(tokens)}
    check_out(out, RUN, header, "quantisation", COMMAND)
    return header


def _run_worker(
    job: QuantizationJob, tokens: Calibration | None, out: Path, on_layer: OnLayer | None
) -> dict[str, Any]:
    """Have the process with llm-compressor's packages write the model. Returns what it took."""
    with scratch("slimgpt-quantize-") as place:
        ids = ""
        if tokens is not None:
            ids = str(place / "ids.safetensors")
            save_file({"ids_NT": tokens.ids_NT}, ids)
        request = place / "request.json"
        request.write_text(
            json.dumps(
                {
                    "model": str(job.model.absolute()),
                    "out": str(out / MADE),
                    "scheme": job.config.scheme,
                    "group": job.group,
                    "dtype": dtype_name(job.dtype),
                    "ids": ids,
                }
            )
        )
        with (out / LOG).open("w") as log, _started(job, request, place, log) as process:
            assert process.stdout is not None, "it is a pipe"
            for line in process.stdout:
                words = line.split()
                if on_layer and words[:1] == ["layer"]:
                    on_layer(int(words[1]), int(words[3]))
    if process.returncode:
        raise ValueError(f"llm-compressor could not quantise {job.model}: {_said(out / LOG)}; see {out / LOG}")
    (out / LOG).unlink()
    result = read_json(out / MADE / "result.json")
    (out / MADE / "result.json").unlink()
    return result


@contextmanager
def _started(job: QuantizationJob, request: Path, place: Path, log: IO[str]) -> Iterator["subprocess.Popen[str]"]:
    """The process, which is gone after the block: it ends when its standard input closes."""
    packages = os.pathsep.join(filter(None, (str(packages_folder().absolute()), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": packages, "TOKENIZERS_PARALLELISM": "false"}
    environment |= worker_environment(job.device)
    # -P: a file of the user's in the working folder must not stand in for a module.
    command = [sys.executable, "-P", "-m", "slimgpt.quantization.worker", str(request)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=place, env=environment)
    try:
        yield process
        process.wait()
    finally:
        process.kill()
        process.communicate()


def _said(log: Path) -> str:
    """The last line of a traceback, or of whatever else was said."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _publish(job: QuantizationJob, out: Path, step: Step) -> None:
    """Turn OUT into a model: what llm-compressor wrote of the weights, all else as the source has it."""
    made, source = out / MADE, job.source
    config = raw_config(job.model) | {"quantization_config": raw_config(made)["quantization_config"]}
    share(made)
    names = weight_files(made)
    for name in (*names, *([INDEX] if (made / INDEX).is_file() else [])):
        commit(made / name, out / name)
    copy_companions(source.folder, out)
    for path in (*source.folder.glob("*.py"), source.folder / REPORT):
        if path.is_file():
            write_atomically(out / path.name, path.read_bytes())
    sha256_by_name = {name: file_sha256(out / name) for name in names}
    sha256_by_name[CONFIG] = config_sha256(config)
    step = replace(step, output=digest_of(sha256_by_name))
    step.figures["bytes_after"] = sum((out / name).stat().st_size for name in names)
    write_atomically(out / LINEAGE, json_bytes(source.lineage.append(step).to_dict()))
    shutil.rmtree(made)
    write_atomically(out / CONFIG, json_bytes(config))


def _step(job: QuantizationJob, tokens: Calibration | None, result: dict[str, Any], seconds: float) -> Step:
    versions = locked_versions()
    how = "rounded (round to nearest)"
    if tokens is not None:
        how = f"by GPTQ on {tokens.facts['tokens']:,} tokens of {tokens.facts['name']}"
    return Step(
        step="quantize",
        model=job.model_name,
        summary=(
            f"{job.config.scheme}: {job.format}, in the decoder's projections; {how}, by llm-compressor "
            f"{versions['llmcompressor']}"
        ),
        config={**job.config.to_dict(), "group_size": job.group},
        figures={
            "parameters_before": job.parameters,
            "parameters_after": job.parameters,
            "projections_before": job.projections,
            "projections_after": job.projections,
            "bytes_before": job.shards.bytes,
            "bytes_after": 0,  # known when it is written
            "seconds": seconds,
            "peak_memory_bytes": result["peak_memory_bytes"],
        },
        data=tokens.facts if tokens is not None else {},
        versions={**versions, "torch": result["torch"]},
        device=device_name(job.device),
        input=job.source.digest,
    )
