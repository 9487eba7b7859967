"""vLLM's door to pruned checkpoints: ``vllm serve DIR`` works wherever this package is installed, without remote code.

vLLM finds ``register`` by the entry point group ``vllm.general_plugins`` and calls it in every process it starts.
"""

import logging

# vLLM shows INFO of its own loggers only, so the line goes out as one of them.
logger = logging.getLogger("vllm.slimgpt")

NATIVE_MODELS = {"SlimLlamaForCausalLM": "deploy.vllm_models:SlimLlamaForCausalLM"}


def register() -> None:
    """Teach this process our config classes (transformers) and model classes (vLLM). Safe to call many times."""
    # The lazy top-level vllm.ModelRegistry fails in vLLM's inspection subprocess; this one does not.
    from vllm.model_executor.models import ModelRegistry

    from slimgpt import modeling

    modeling.register()
    new = [name for name in NATIVE_MODELS if name not in ModelRegistry.get_supported_archs()]
    for name in new:
        ModelRegistry.register_model(name, NATIVE_MODELS[name])
    if new:
        logger.info("slimgpt: %s served by its native vLLM class", ", ".join(new))
