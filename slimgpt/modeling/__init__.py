"""The model classes of pruned checkpoints, registered with transformers so that no remote code is needed."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .slim_llama import SlimLlamaConfig, SlimLlamaForCausalLM, SlimLlamaModel

__all__ = ["SlimLlamaConfig", "SlimLlamaForCausalLM", "SlimLlamaModel", "register"]


def register() -> None:
    """Make ``AutoModelForCausalLM.from_pretrained`` know pruned checkpoints. Safe to call many times."""
    AutoConfig.register(SlimLlamaConfig.model_type, SlimLlamaConfig, exist_ok=True)
    AutoModel.register(SlimLlamaConfig, SlimLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(SlimLlamaConfig, SlimLlamaForCausalLM, exist_ok=True)
