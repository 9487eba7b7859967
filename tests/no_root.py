"""Python code run as a user whom permissions bind, also where the tests run as root."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_RIGHTS = "-dac_override,-dac_read_search"


def run_bound(code: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run ``code`` with ``sys`` and ``Path`` imported; root gives up its right to read and write everything."""
    command = [sys.executable, "-c", f"import sys; from pathlib import Path\n{code}", *map(str, arguments)]
    if os.geteuid() == 0:
        if not (setpriv := shutil.which("setpriv")):
            pytest.skip("root may read and write every file, and there is no setpriv to give that up")
        command = [setpriv, f"--bounding-set={_RIGHTS}", f"--inh-caps={_RIGHTS}", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False)
