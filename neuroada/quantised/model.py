"""A model's Linear layers, quantised where they stand, and made dense again."""

import re
from typing import Any, TypeVar

from torch import nn

from neuroada.errors import UserError
from neuroada.quantised.linear import QuantisedLinear
from neuroada.quantised.packed import METHOD, Quantisation

Model = TypeVar("Model", bound=nn.Module)


def quantise(model: Model, quantisation: Quantisation) -> Model:
    """Replace, in place, the Linear layers inside the repeated blocks: not embeddings, norms and the output layer.

    A model on the meta device gets layers without values. UserError: a layer the format does not fit; a model that
    holds quantised layers already, of this package or another's.
    """
    found = [(name, module) for name, module in model.named_modules() if re.search(r"(^|\.)\d+\.", name)]
    for name, module in found:
        weight = module._parameters.get("weight")
        if isinstance(module, QuantisedLinear) or (weight is not None and not _is_plain(weight)):
            raise UserError(f"base.model_dtype = {quantisation.format}: {name} is already quantised; leave it out")
    linears = [(name, module) for name, module in found if type(module) is nn.Linear]
    if not linears:
        raise UserError(f"base.model_dtype = {quantisation.format}: {type(model).__name__} has no Linear in its blocks")
    for name, module in linears:
        model.set_submodule(name, QuantisedLinear.of(module, quantisation, name))
    return model


def dequantise(model: Model) -> Model:
    """Replace, in place, every quantised layer by the dense one of the same values."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantisedLinear):
            model.set_submodule(name, module.dequantised())
    declare_dense(model)
    return model


def declare_dense(model: nn.Module) -> None:
    """Where no quantised layer is left, take out of a transformers model what calls it quantised: it can be saved."""
    config: Any = getattr(model, "config", None)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if method != METHOD or any(isinstance(module, QuantisedLinear) for module in model.modules()):
        return
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    else:
        del config.quantization_config


def _is_plain(weight: nn.Parameter) -> bool:
    # By type too: torchao's tensors, and bitsandbytes' with float storage, say that they are floating point.
    return type(weight) is nn.Parameter and type(weight.data).__module__ == "torch" and weight.is_floating_point()
