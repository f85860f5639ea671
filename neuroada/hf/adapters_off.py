"""A tuned model as its base, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Forward passes inside are those of the base.

    PEFT's own `disable_adapter` also turns requires_grad off and on again, under which the engines' hooks on gradients
    do not stay in place; here nothing but the layers' flag changes.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
