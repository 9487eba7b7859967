"""The model classes of pruned checkpoints, registered with transformers so that no remote code is needed."""

from importlib import import_module

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..architectures import FAMILIES


def register() -> None:
    """Make ``AutoModelForCausalLM.from_pretrained`` know pruned checkpoints. Safe to call many times."""
    for family in FAMILIES:
        module = import_module(f".{family.slim}", __name__)
        config_class = getattr(module, family.slim_class("Config"))
        AutoConfig.register(family.slim, config_class, exist_ok=True)
        AutoModel.register(config_class, getattr(module, family.slim_class("Model")), exist_ok=True)
        AutoModelForCausalLM.register(config_class, getattr(module, family.slim_class("ForCausalLM")), exist_ok=True)
