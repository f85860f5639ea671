"""A model's tokenizer, configuration and weights, from a hub id or a folder; no code of its repository is run."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuroada.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_dtype(name: str, device: torch.device) -> torch.dtype:
    """train.dtype as torch's; UserError where the device has none."""
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"train.dtype = bf16: {torch.cuda.get_device_name(device)} has no bf16; use train.dtype=fp32")
    return DTYPES[name]


def load_tokenizer(source: str) -> Any:
    """The model's tokenizer, with a pad token: its EOS where it has none (padding is masked by position anyway)."""
    from transformers import AutoTokenizer

    check_source(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"model = {source}: no tokenizer there: {_first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: str) -> Any:
    """The model's configuration."""
    from transformers import AutoConfig

    check_source(source)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"model = {source}: no configuration there: {_first_line(error)}") from None


def load_pretrained(
    auto: Any, source: str, dtype: torch.dtype, attention: str = "sdpa", options: dict[str, Any] | None = None
) -> nn.Module:
    """The base model by the transformers class `auto`, which takes `options` (a classifier's number of labels, say).

    Loading happens on the CPU, and partitioned as it loads where an engine has asked transformers to.
    """
    fresh = {"ignore_mismatched_sizes": True} if options else {}  # another task's classifier may be in the files
    check_source(source)
    try:
        return auto.from_pretrained(source, dtype=dtype, attn_implementation=attention, **(options or {}), **fresh)
    except (OSError, ValueError) as error:
        raise UserError(f"model = {source}: cannot be loaded: {_first_line(error)}") from None


def build_empty(
    auto: Any, source: str, dtype: torch.dtype, attention: str, options: dict[str, Any] | None = None
) -> nn.Module:
    """The same model without values: parameters on the meta device, buffers real."""
    from accelerate import init_empty_weights

    config = load_config(source)
    config.update(options or {})
    with init_empty_weights(include_buffers=False):
        model: nn.Module = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    return model


def is_path(source: str) -> bool:
    """Whether `source` can only be meant as a folder, not as a hub id."""
    return source.startswith((".", "/", "~", "models/", "runs/")) or source.count("/") > 1


def check_source(source: str) -> None:
    """Refuse a path that is no folder before the hub is asked for it."""
    if is_path(source) and not Path(source).is_dir():
        raise UserError(f"model = {source}: no such folder; see `neuroada fetch model --help`")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
