"""Settings: frozen dataclasses, checked when they are made."""

from slimgpt.config.evaluation import EvalConfig
from slimgpt.config.fields import BosPolicy, check_limits, limits_text, option
from slimgpt.config.pruning import MAX_RATIO, PruneConfig, paper_preset
from slimgpt.config.quantization import QuantizeConfig
from slimgpt.config.recovery import RecoverConfig

__all__ = [
    "MAX_RATIO",
    "STAGE_CONFIGS",
    "BosPolicy",
    "EvalConfig",
    "PruneConfig",
    "QuantizeConfig",
    "RecoverConfig",
    "check_limits",
    "limits_text",
    "option",
    "paper_preset",
]

# What can be done to a model, by the name of the step in its lineage.
STAGE_CONFIGS = {"prune": PruneConfig, "recover": RecoverConfig, "quantize": QuantizeConfig}
