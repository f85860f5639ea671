"""What a recipe trains, by method: NeuroAda, and those it is compared with."""

import torch
from torch import nn

from neuroada.training.model import attach
from neuroada.training.recipe import Adapter

METHODS = ("neuroada", "lora", "masked", "full")


def attach_method(model: nn.Module, adapter: Adapter, method: str) -> nn.Module:
    """Make ready to train `model` by `method`.

    lora: PEFT's. masked: the whole target weights train, and a mask of each one's shape and dtype clears all but k
    entries of a row from their dense gradients. full: every weight trains.
    """
    if method in ("neuroada", "lora"):
        return attach(model, adapter.model_copy(update={"method": method}), seed=0)
    model.requires_grad_(method == "full")
    if method == "masked":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in adapter.target_modules:
                module.weight.requires_grad_(True)
                module.register_buffer("mask", torch.empty_like(module.weight))
    return model
