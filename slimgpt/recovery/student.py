"""The model that is trained: what of it is, and what the training has made of each stored tensor."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimgpt.checkpoints.families import Family
from slimgpt.checkpoints.loading import load_to_compute
from slimgpt.config import RecoverConfig

LORA_SCALE = {"distill": 1, "lora": 2}  # the paper's: rank 8, alpha 16, dropout 0.05
LORA_DROPOUT = {"distill": 0.0, "lora": 0.05}
Change = Callable[[Tensor], Tensor]


def load_student(folder: Path, model_config: Any, family: Family, config: RecoverConfig, dtype: torch.dtype) -> Any:
    """The model in ``folder`` with what ``config.trainable`` names to be trained, in float32; the rest is frozen.

    Args:
        folder: of the pruned model.
        model_config: its config.
        family: where its projections are.
        config: how it is trained.
        dtype: of the products.
    """
    if config.trainable == "all":
        model = load_to_compute(folder, torch.float32, model_config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(f"{family.layers}."))
        return model
    from peft import LoraConfig, get_peft_model

    projections = [*family.rows, family.output, family.down]
    scale, dropout = LORA_SCALE[config.method], LORA_DROPOUT[config.method]
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=scale * config.rank,
        lora_dropout=dropout,
        target_modules=projections,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_to_compute(folder, dtype, model_config), lora)
    generator = torch.Generator().manual_seed(config.seed)  # peft's is the process's own, which other threads use too
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
    return model


def changes(model: Any) -> dict[str, Change]:
    """What became of each stored tensor that was trained, by its name: from what is stored to what is to be.

    Adapters are added in float32 to the weight as it is stored, not to its rounded copy that was trained with.
    """
    if not hasattr(model, "peft_config"):
        return {name: _replaced(p) for name, p in model.named_parameters() if p.requires_grad}
    from peft.tuners.lora import LoraLayer

    modules = model.get_base_model().named_modules()
    return {f"{name}.weight": _merged(module) for name, module in modules if isinstance(module, LoraLayer)}


def take_as_written(model: Any, stored: Callable[[str], Tensor]) -> None:
    """Give the model the weights that ``changes`` makes, rounded as they are written; adapters are merged, and stay.

    Args:
        model: trained; one with adapters computes what is written while they are disabled.
        stored: a tensor of the checkpoint that was trained, by its name.
    """
    adapted = hasattr(model, "peft_config")
    own = model.get_base_model() if adapted else model
    with torch.no_grad():
        for name, change in changes(model).items():
            module, _, kind = name.rpartition(".")
            parameter = (
                own.get_submodule(module).base_layer.weight if adapted else getattr(own.get_submodule(module), kind)
            )
            parameter.copy_(change(stored(name)))


def _replaced(parameter: Tensor) -> Change:
    return lambda stored: parameter.detach().to("cpu", stored.dtype)


def _merged(adapter: Any) -> Change:
    return lambda stored: (stored.float() + adapter.get_delta_weight("default").float().cpu()).to(stored.dtype)
