"""llm-compressor's packages: in a folder of their own, since it takes other versions than the rest of this project.

The folder is read in front of what is installed, by the process that quantises alone: torch and all else are shared.
"""

import os
import sys
from importlib.metadata import distributions
from pathlib import Path

from slimgpt.files import expanded

LOCK = Path(__file__).with_name("llmcompressor.txt")
VARIABLE = "SLIMGPT_QUANTIZE_PACKAGES"


def packages_folder() -> Path:
    """Where they are: ``SLIMGPT_QUANTIZE_PACKAGES``, or a folder of this Python environment."""
    return expanded(os.environ.get(VARIABLE) or Path(sys.prefix) / "slimgpt-quantize")


def locked_versions() -> dict[str, str]:
    """The versions that were tested together, by the package's name."""
    return dict(line.split("==") for line in LOCK.read_text().split())


def missing_packages() -> str:
    """One line with what is missing and the command that installs it; empty where nothing is."""
    folder = packages_folder()
    there = {found.name.lower().replace("_", "-"): found.version for found in distributions(path=[str(folder)])}
    lacking = [f"{name} {version}" for name, version in locked_versions().items() if there.get(name) != version]
    if not lacking:
        return ""
    return (
        f"llm-compressor is not installed ({folder} lacks {lacking[0]}); it takes other versions than the rest, so it "
        f"goes into a folder of its own: {sys.executable} -m pip install --no-deps --upgrade --target {folder} -r "
        f"{LOCK}"
    )
