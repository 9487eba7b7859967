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
            AutoConfig.register(file.name, config_class, exist_ok=True)
            AutoModel.register(config_class, _own_class(module, "Model"), exist_ok=True)
            AutoModelForCausalLM.register(config_class, _own_class(module, "ForCausalLM"), exist_ok=True)


def _own_class(module: ModuleType, ending: str) -> Any:
    """The one class of ``module`` itself, not of what it imports, whose name ends so."""
    (own_class,) = (
        value
        for name, value in vars(module).items()
        if name.endswith(ending) and getattr(value, "__module__", "") == module.__name__
    )
    return own_class


register()
