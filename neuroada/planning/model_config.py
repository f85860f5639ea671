"""A model's configuration without its weights, and the model on the meta device."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuroada.errors import UserError
from neuroada.tasks.table import get_task
from neuroada.training.model import DTYPES
from neuroada.training.recipe import Recipe

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
                f"model = {source}: no such folder, not in the hub's cache, and its config.json is not in "
                f"neuroada/planning/configs/; fetch it (`hf download {source} config.json`)"
            )
        path, origin = Path(cached), "the hub's cache"
    values = json.loads(path.read_text())
    return AutoConfig.for_model(values.pop("model_type"), **values), origin


def on_meta(config: Any, recipe: Recipe, layers: int | None = None) -> nn.Module:
    """The recipe's base model with shapes and dtypes alone; `layers` gives it another number of decoder layers."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = type(config).from_dict(config.to_dict())  # a copy: layer_types follow the number of layers below
    task = get_task(recipe.task)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    model_class: Any = AutoModelForCausalLM
    if task.suite == "glue":
        model_class, config.num_labels = AutoModelForSequenceClassification, task.num_labels
    with torch.device("meta"):
        model: nn.Module = model_class.from_config(config, dtype=DTYPES[recipe.train.dtype], attn_implementation="sdpa")
    return model
