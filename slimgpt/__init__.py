"""SlimGPT: structured pruning of LLaMA-family models, layer by layer, by Optimal Brain Surgeon (arXiv 2412.18110).

The public face. A name is imported when it is first used, so ``import slimgpt`` needs neither torch nor transformers.
``import slimgpt.modeling`` makes transformers know pruned checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimgpt.checkpoints.lineage import load_lineage
    from slimgpt.config import EvalConfig, PruneConfig, QuantizeConfig, RecoverConfig
    from slimgpt.engine.plan import plan
    from slimgpt.engine.pruner import prune
    from slimgpt.evaluation.harness import evaluate
    from slimgpt.quantization.quantizer import quantize
    from slimgpt.recovery.recoverer import recover
    from slimgpt.report import load_report

__version__ = "0.1.0"
__all__ = [
    "EvalConfig",
    "PruneConfig",
    "QuantizeConfig",
    "RecoverConfig",
    "evaluate",
    "load_lineage",
    "load_report",
    "plan",
    "prune",
    "quantize",
    "recover",
]

_HOME = {
    "EvalConfig": "slimgpt.config",
    "PruneConfig": "slimgpt.config",
    "QuantizeConfig": "slimgpt.config",
    "RecoverConfig": "slimgpt.config",
    "evaluate": "slimgpt.evaluation.harness",
    "load_lineage": "slimgpt.checkpoints.lineage",
    "load_report": "slimgpt.report",
    "plan": "slimgpt.engine.plan",
    "prune": "slimgpt.engine.pruner",
    "quantize": "slimgpt.quantization.quantizer",
    "recover": "slimgpt.recovery.recoverer",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its room (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'slimgpt' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
