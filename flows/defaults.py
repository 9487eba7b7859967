"""What ``compress`` does by default: sized for two CPU cores and a quarter of an hour.

Each section has a type of its own, for the flows' signatures: a deployment run that sets one key of a section
(``--param 'prune={"ratio": 0.3}'``) leaves the others at these defaults, not at those of the library.
"""

import dataclasses
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator

from deploy.bench.config import BenchConfig
from slimgpt.config import EvalConfig, PruneConfig, QuantizeConfig, RecoverConfig
from tasks.registry.config import RegistryConfig
from tasks.sweep.config import SweepConfig

PRUNE = PruneConfig(num_samples=64, seq_len=1024)
RECOVER = RecoverConfig(tokens="")  # none: training takes longer than all the rest
QUANTIZE = QuantizeConfig(scheme="", num_samples=32, seq_len=1024)
EVALUATION = EvalConfig(limit=20)  # seven tasks in about two minutes a model
# `slimgpt bench` also measures other loads, offline, and each pair on servers of its own.
BENCH = BenchConfig(load_shares=(), offline=False, restart=False)
REGISTRY = RegistryConfig()
SWEEP = SweepConfig()


def check_recovery(recover: RecoverConfig) -> None:
    """Refuse settings of a training that would not take place.

    Raises:
        ValueError: naming what is missing.
    """
    if not recover.tokens and recover != RECOVER:
        raise ValueError("recover has settings and no tokens, so nothing would be trained; give recover.tokens")


def check_quantization(quantize: QuantizeConfig) -> None:
    """Refuse settings of a quantisation that would not take place.

    Raises:
        ValueError: naming what is missing.
    """
    if not quantize.scheme and quantize != QUANTIZE:
        raise ValueError(
            "quantize has settings and no scheme, so nothing would be quantised; give quantize.scheme, such as w4a16"
        )


def _completed(defaults: Any, given: Any) -> Any:
    """A section as JSON brings it, with the flow's defaults for what it does not set."""
    if not isinstance(given, dict):
        return given
    known = {item.name: getattr(defaults, item.name) for item in dataclasses.fields(defaults)}
    if unknown := sorted(given.keys() - known.keys()):
        raise ValueError(f"{unknown[0]} is not known; known are {', '.join(known)}")
    return {**known, **given}


PruneSection = Annotated[PruneConfig, BeforeValidator(partial(_completed, PRUNE))]
RecoverSection = Annotated[RecoverConfig, BeforeValidator(partial(_completed, RECOVER))]
QuantizeSection = Annotated[QuantizeConfig, BeforeValidator(partial(_completed, QUANTIZE))]
EvaluationSection = Annotated[EvalConfig, BeforeValidator(partial(_completed, EVALUATION))]
BenchSection = Annotated[BenchConfig, BeforeValidator(partial(_completed, BENCH))]
RegistrySection = Annotated[RegistryConfig, BeforeValidator(partial(_completed, REGISTRY))]
SweepSection = Annotated[SweepConfig, BeforeValidator(partial(_completed, SWEEP))]
