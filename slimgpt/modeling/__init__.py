"""The model classes of pruned checkpoints. Importing this registers them with transformers: no remote code is needed.

Needs transformers alone, like the files beside it. A family is one of those files, ``slim_<family>.py``, which is also
the ``model_type`` of its pruned checkpoints.
"""

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM


def register() -> None:
    """Make ``AutoModelForCausalLM.from_pretrained`` know pruned checkpoints. Safe to call many times."""
    for file in pkgutil.iter_modules(__path__):
        if file.name.startswith("slim_"):
            module = import_module(f"{__name__}.{file.name}")
            config_class = _own_class(module, "Config")
            model_class, causal_class = _own_class(module, "Model"), _own_class(module, "ForCausalLM")
            AutoConfig.register(file.name, config_class, exist_ok=True)
            AutoModel.register(config_class, model_class, exist_ok=True)
            AutoModelForCausalLM.register(config_class, causal_class, exist_ok=True)
            # save_pretrained then writes the code beside the weights, as after a training or a merged LoRA.
            config_class.register_for_auto_class("AutoConfig")
            model_class.register_for_auto_class("AutoModel")
            causal_class.register_for_auto_class("AutoModelForCausalLM")


def _own_class(module: ModuleType, ending: str) -> Any:
    """The one class of ``module`` itself, not of what it imports, whose name ends so."""
    (own_class,) = (
        value
        for name, value in vars(module).items()
        if name.endswith(ending) and getattr(value, "__module__", "") == module.__name__
    )
    return own_class


register()
