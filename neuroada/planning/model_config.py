"""A model's configuration without its weights, and the model on the meta device."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from neuroada.errors import UserError
from neuroada.training.classifier import auto_class
from neuroada.training.model import DTYPES
from neuroada.training.recipe import Recipe

# Rows without padding need no mask, but transformers makes one wherever it sees a fake tensor (5.23): tell it not to.
AttentionInterface.register("unmasked_sdpa", sdpa_attention_forward)
AttentionMaskInterface.register("unmasked_sdpa", lambda *args, **kwargs: None)

CONFIGS = Path(__file__).parent / "configs"


def find_config(source: str) -> tuple[Any, str]:
    """(the model's configuration, where it was found): a local folder, this repository, the hub's cache; no download.

    `source` is a folder or a hub id. UserError if it is in none of them.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    kept = CONFIGS / f"{source.replace('/', '--')}.json"
    if (Path(source) / "config.json").is_file():
        path, origin = Path(source) / "config.json", "local folder"
    elif kept.is_file():
        path, origin = kept, "kept in the repository"
    else:
        try:
            cached = cached_file(source, "config.json", local_files_only=True)
        except (OSError, ValueError):
            cached = None
        if cached is None:
            raise UserError(
                f"model = {source}: its config.json is in no folder of that name, not in the hub's cache and not in "
                f"neuroada/planning/configs/; {remedy(source)}"
            )
        path, origin = Path(cached), "the hub's cache"
    values = json.loads(path.read_text())
    return AutoConfig.for_model(values.pop("model_type"), **values), origin


def remedy(source: str) -> str:
    """How to come by a model that is not here."""
    if source.count("/") == 1 and not source.startswith((".", "/", "~", "models/", "runs/")):
        return f"hf download {source}"
    return "see `python launch/fetch.py model --help`"


def on_meta(config: Any, recipe: Recipe, layers: int | None = None) -> nn.Module:
    """The recipe's base model with shapes and dtypes alone; `layers` gives it another number of decoder layers."""
    config = type(config).from_dict(config.to_dict())  # a copy
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    auto, options = auto_class(recipe.task)
    for name, value in options.items():
        setattr(config, name, value)
    with torch.device("meta"):
        attention = "unmasked_sdpa" if recipe.train.packing else "sdpa"
        model: nn.Module = auto.from_config(config, dtype=DTYPES[recipe.train.dtype], attn_implementation=attention)
    return model
