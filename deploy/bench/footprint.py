"""What a model takes: file size, load time, KV cache and peak memory of a running server."""

import contextlib
import re
import subprocess
from pathlib import Path

from deploy.bench.results import Footprint
from deploy.engines.availability import serves_on_cpu
from deploy.serving.server import RunningServer, session_members


def footprint(model: Path, server: RunningServer) -> Footprint:
    """Of ``model`` under ``server``, after its load: memory peaks are those until now."""
    pids = session_members(server.pid)
    load, tokens = _from_log(server.log, r"Loading weights took ([\d.]+) s"), _from_log(server.log, _KV_TOKENS)
    return Footprint(
        file_bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")),
        start_seconds=server.start_seconds,
        load_seconds=load,
        kv_cache_tokens=None if tokens is None else int(tokens),
        peak_memory_bytes=peak_resident(pids) if serves_on_cpu() else gpu_memory(pids),
    )


_KV_TOKENS = r"KV cache size: ([\d,]+) tokens"


def peak_resident(pids: list[int]) -> int | None:
    """Sum of the processes' highest resident memory, bytes; None where the kernel does not say (not Linux)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            total += 1024 * int(match[1]) if match else 0
    return total or None


def gpu_memory(pids: list[int]) -> int | None:
    """Memory that the processes hold on all GPUs, bytes; None where nvidia-smi does not list them (in a container).

    vLLM takes its KV cache when it starts and returns nothing while it runs, so what it holds is its peak.
    """
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    total = sum(int(mib) for pid, mib in re.findall(r"^(\d+), (\d+)$", listed, flags=re.MULTILINE) if int(pid) in pids)
    return total * 1024**2 or None


def _from_log(log: Path, pattern: str) -> float | None:
    matches = re.findall(pattern, log.read_text(errors="replace"))
    return float(matches[-1].replace(",", "")) if matches else None
