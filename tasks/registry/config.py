"""How a compression is registered. Needs no MLflow."""

import re
from dataclasses import dataclass
from typing import Literal

from slimgpt.config import check_limits, option


@dataclass(frozen=True, kw_only=True)
class RegistryConfig:
    """Where a run goes in MLflow, and whether the weights go along.

    Raises:
        ValueError: on construction, when a field is outside its limits.
    """

    experiment: str = option("slimgpt", "MLflow experiment; made where there is none of the name.")
    run_name: str = option("", "Name of the MLflow run; empty for the registered model's name.")
    weights: Literal["copy", "reference"] = option(
        "copy",
        "copy: the files go into the artifact store; reference: they stay in the run's folder, which must stay too and "
        "be reachable from where the model is used, and the registry holds its path and checksum.",
    )
    machine_seconds: float = option(
        10.0,
        "Seconds between two samples of CPU, memory, disk, network and GPUs (MLflow's system metrics); 0: none.",
        ge=0,
    )

    def __post_init__(self) -> None:
        check_limits(self)
        if not re.fullmatch(r"\S(.*\S)?", self.experiment):
            raise ValueError(f"experiment is {self.experiment!r}; it must be a name without blanks around it")
