"""vLLM's door to pruned checkpoints: ``vllm serve DIR`` works wherever this package is installed, without remote code.

vLLM finds ``register`` by the entry point group ``vllm.general_plugins`` and calls it in every process it starts.
"""

import logging
from typing import Any

from deploy.engines.availability import vllm_version
from deploy.engines.tensor_parallel import check_tensor_parallel
from deploy.engines.vllm_entry import version_obstacle, version_remark
from slimgpt.equal_bits import settle_vector_functions

# vLLM shows INFO of its own loggers only, so the line goes out as one of them.
logger = logging.getLogger("vllm.slimgpt")

NATIVE: tuple[str, ...] = ("llama", "mistral", "phi3")


class ParallelCheck:
    """vLLM asks this about each of our models before it starts a worker."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse a tensor-parallel size that does not divide every layer: raises ValueError."""
        check_tensor_parallel(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Nothing to say about the model alone."""


def register() -> None:
    """Teach this process our config classes (transformers) and model classes (vLLM). Safe to call many times.

    A family that is not in NATIVE is served by vLLM's Transformers backend, which builds our transformers class; so is
    every family where vLLM is newer than the tested range: our classes use its inside, which changes between minor
    releases. With an older one nothing is registered and an error is logged: other models must still be served.
    """
    installed = vllm_version()
    if reason := version_obstacle(installed):
        logger.error("slimgpt: pruned checkpoints are not registered: %s", reason)
        return
    native = NATIVE
    if remark := version_remark(installed):
        logger.warning("slimgpt: %s", remark)
        native = ()
    _request_amx()
    settle_vector_functions()
    # The lazy top-level vllm.ModelRegistry fails in vLLM's inspection subprocess; this one does not.
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import slimgpt.modeling  # noqa: F401  registers the config classes with transformers
    from slimgpt.checkpoints.families import FAMILIES

    known = ModelRegistry.get_supported_archs()
    new = [family for family in FAMILIES if family.slim_class("ForCausalLM") not in known]
    for family in new:
        own = family.slim_class("ForCausalLM")
        served_by = (
            f"deploy.engines.vllm_models:{own}"
            if family.model_type in native
            else "vllm.model_executor.models.transformers:TransformersForCausalLM"
        )
        ModelRegistry.register_model(own, served_by)
        MODELS_CONFIG_MAP[own] = ParallelCheck
    if new:
        words = ", ".join(native) or "none"
        logger.info("slimgpt: pruned checkpoints of %d families are known, %s by native classes", len(new), words)


def _request_amx() -> None:
    """Ask Linux for the tile registers of a CPU with AMX, which a process may not use before.

    vLLM 0.32 leaves that to oneDNN. Where all weights are under 1 MiB oneDNN is not called, and vLLM's own attention
    kernel ends the process at the first request in bfloat16 (SIGILL).
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
