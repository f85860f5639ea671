"""The recipe's model with shapes and dtypes alone, on the meta device."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from neuroada.config.recipe import Recipe
from neuroada.hf.attention_sinks import has_sinks
from neuroada.hf.loading import DTYPES
from neuroada.hf.quantised import choose_quantisation
from neuroada.methods import Method
from neuroada.objectives import Objective
from neuroada.quantised import quantise

# Rows without padding need no mask, but transformers makes one wherever it sees a fake tensor (5.23): tell it not to.
AttentionInterface.register("unmasked", sdpa_attention_forward)
AttentionMaskInterface.register("unmasked", lambda *args, **kwargs: None)


def on_meta(config: Any, recipe: Recipe, method: Method, objective: Objective, layers: int | None = None) -> nn.Module:
    """The model with what `method` trains attached; `layers` gives it another number of decoder layers.

    config: the model's transformers configuration.
    """
    config = type(config).from_dict(config.to_dict())  # a copy
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    auto, options = objective.auto_class()
    for name, value in options.items():
        setattr(config, name, value)
    dtype = method.storage_dtype(DTYPES[recipe.train.dtype])
    attention = "unmasked" if recipe.train.packed or has_sinks(config) else "sdpa"
    with torch.device("meta"):
        base: nn.Module = auto.from_config(config, dtype=dtype, attn_implementation=attention)
        if (quantisation := choose_quantisation(recipe, config)) is not None:
            method.check_quantised(quantisation)
            quantise(base, quantisation)
        return method.attach(base, objective.task_type)
