"""What a recipe trains, by method: NeuroAda, and those it is compared with."""

import torch
from torch import nn

from neuroada.training.model import attach
from neuroada.training.recipe import Adapter

METHODS = ("frozen", "neuroada", "lora", "masked", "full")


def attach_method(model: nn.Module, adapter: Adapter, method: str) -> nn.Module:
    """Make ready to train `model` by `method`.

    lora: PEFT's. masked: the whole target weights train in their own dtype, and a mask of each one's shape and dtype
    clears all but k entries of a row from their dense gradients. full: every weight trains in its own dtype. frozen:
    the floor, one norm of the lowest layer, so that backward runs through the whole model.
    """
    if method in ("neuroada", "lora"):
        return attach(model, adapter.model_copy(update={"method": method}), seed=0)
    model.requires_grad_(method == "full")
    if method == "frozen":
        norms = [module for name, module in model.named_modules() if "layers.0." in name and "norm" in name.lower()]
        norms[0].requires_grad_(True)
    if method == "masked":
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in adapter.target_modules:
                module.weight.requires_grad_(True)
                module.register_buffer("mask", torch.empty_like(module.weight))
    return model
