"""From a recipe to a model with its adapter attached."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuroada.errors import UserError
from neuroada.training.classifier import auto_class, has_classifier, train_in_fp32
from neuroada.training.methods import WHOLE_WEIGHTS, sparse_config, train_weights
from neuroada.training.recipe import Adapter, Recipe

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The recipe's dtype, refused where the device has none."""
    if recipe.train.dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"train.dtype = bf16: {torch.cuda.get_device_name(device)} has no bf16; use train.dtype=fp32")
    return DTYPES[recipe.train.dtype]


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer, with a pad token: its EOS where it has none (padding is masked by position anyway)."""
    from transformers import AutoTokenizer

    _check_folder(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"model = {source}: no tokenizer there: {_first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: str) -> Any:
    """The model's configuration; no code of its repository is run."""
    from transformers import AutoConfig

    _check_folder(source)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"model = {source}: no configuration there: {_first_line(error)}") from None


def load_base(recipe: Recipe, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """The frozen base model, from a hub id or folder, as its task needs it; no code of its repository is run.

    Loading happens on the CPU, and partitioned as it loads where an engine has asked transformers to.
    """
    source = recipe.model
    auto, options = auto_class(recipe.task)
    fresh = {"ignore_mismatched_sizes": True} if options else {}  # another task's classifier may stand in the files
    _check_folder(source)
    try:
        return auto.from_pretrained(source, dtype=dtype, attn_implementation=attention, **options, **fresh)
    except (OSError, ValueError) as error:
        raise UserError(f"model = {source}: cannot be loaded: {_first_line(error)}") from None


def attach(model: nn.Module, adapter: Adapter, seed: int) -> nn.Module:
    """Freeze the model and add what the recipe trains; or let its own weights train."""
    if adapter.method in WHOLE_WEIGHTS:
        return train_weights(model, adapter, seed)
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from neuroada import NeuroAdaConfig

    targets = list(adapter.target_modules)
    # Of SEQ_CLS PEFT trains and saves the classifier too.
    task_type = "SEQ_CLS" if has_classifier(model) else "CAUSAL_LM"
    if adapter.method == "neuroada":
        # "gradient" leaves the choice for later; a selection file then says how its own was made.
        selection = "gradient" if adapter.selects_later else adapter.selection
        config: Any = NeuroAdaConfig(
            k=adapter.k, selection=selection, target_modules=targets, seed=seed, task_type=task_type
        )
    elif adapter.method in ("shira", "supertuning"):
        config = sparse_config(adapter, seed, task_type)
    elif adapter.method == "head":
        if task_type != "SEQ_CLS":
            raise UserError(f"adapter.method = head: {type(model).__name__} has no classifier to train alone")
        config = LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type=task_type)  # PEFT's name for no target
    else:
        config = LoraConfig(r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=targets, task_type=task_type)
    tuned = get_peft_model(model, config, autocast_adapter_dtype=True)
    train_in_fp32(tuned)
    return tuned


def _check_folder(source: str) -> None:
    """Refuse a path that is no folder before the hub is asked for it."""
    if not Path(source).is_dir() and source.startswith((".", "/", "~", "models/", "runs/")):
        raise UserError(f"model = {source}: no such folder; see `python launch/fetch.py model --help`")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
