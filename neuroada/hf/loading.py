"""A model's tokenizer, configuration and weights, from a hub id or a folder; no code of its repository is run."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neuroada.errors import UserError
from neuroada.hf.model_folder import AGAIN, check_found, check_model_folder, check_shapes, first_line, read_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def check_dtype(name: str, device: torch.device) -> torch.dtype:
    """train.dtype as torch's; UserError where the device has none."""
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"train.dtype = bf16: {torch.cuda.get_device_name(device)} has no bf16; use train.dtype=fp32")
    return DTYPES[name]


def load_tokenizer(source: str, field: str = "model = ") -> Any:
    """The model's tokenizer, with a pad token: its EOS where it has none, or one that the model has no embedding for
    (padding is masked by position anyway). UserError: none there, damaged, or with ids that the model does not know.
    """
    from transformers import AutoTokenizer

    check_source(source, field)
    size = _embeddings(Path(source))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= size:
            tokenizer.pad_token = tokenizer.eos_token
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"model_max_length is {tokenizer.model_max_length!r}, not a number")
    except Exception as error:  # of several libraries, whatever odd files provoke
        raise UserError(f"{field}{source}: no tokenizer there: {first_line(error)}; {AGAIN}") from error
    _check_ids(tokenizer, size, f"{field}{source}")
    return tokenizer


def _embeddings(folder: Path) -> float:
    """How many tokens the model of a folder knows; infinity of a hub id, and where its config.json does not say."""
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get("vocab_size")
    return size if isinstance(size, int) else math.inf


def _check_ids(tokenizer: Any, size: float, told: str) -> None:
    """UserError where a token that texts turn into has no embedding. Added ones, of images say, may have none."""
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "cls_token", "sep_token")}
    ids = {repr(token): tokenizer.convert_tokens_to_ids(token) for token in named.values() if token is not None}
    if tokenizer.is_fast:
        ids |= tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    token = max(ids, key=lambda token: ids[token] or 0, default=None)
    if token is not None and (ids[token] or 0) >= size:
        raise UserError(
            f"{told}: its tokenizer gives {token[:40]} the id {ids[token]}, and the model knows {size}; {AGAIN}"
        )


def load_config(source: str, field: str = "model = ") -> Any:
    """The model's configuration."""
    from transformers import AutoConfig

    check_source(source, field)
    if Path(source).is_dir():
        read_config(Path(source))
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{field}{source}: no configuration there: {first_line(error)}; {AGAIN}") from error


def load_pretrained(
    auto: Any, source: str, field: str = "model = ", *, options: dict[str, Any] | None = None, **how: Any
) -> nn.Module:
    """The base model by the transformers class `auto`, from safetensors alone, every parameter from its files.

    options: of a classifier, such as its number of labels: then its head may be missing in the files, or another
    task's. how: dtype and the like, passed on. Loading happens on the CPU, and partitioned as it loads where an engine
    has asked transformers to. UserError: a file that is damaged or leads elsewhere, parameters that the files lack.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    from neuroada.hf.head import HEADS

    told, free = f"{field}{source}", HEADS if options else ()
    check_source(source, field)
    if Path(source).is_dir():
        _, stored = check_model_folder(Path(source), field)
        if not is_deepspeed_zero3_enabled():  # which would partition a model without values
            check_shapes(_on_meta(auto, load_config(source, field), field, options), stored, told, free)
    fresh = {"ignore_mismatched_sizes": True} if options else {}
    try:
        model, found = auto.from_pretrained(
            source, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **how, **(options or {}),
            **fresh,
        )  # fmt: skip
    except Exception as error:
        raise UserError(f"{told}: cannot be loaded: {first_line(error)}; {AGAIN}") from error
    check_found(found, told, free)
    loaded: nn.Module = model
    return loaded


def _on_meta(auto: Any, config: Any, field: str, options: dict[str, Any] | None, **how: Any) -> nn.Module:
    from accelerate import init_empty_weights

    try:
        config.update(options or {})
        with init_empty_weights(include_buffers=False):
            model: nn.Module = auto.from_config(config, **how)
    except Exception as error:
        raise UserError(
            f"{field}{config.name_or_path}: config.json makes no model: {first_line(error)}; {AGAIN}"
        ) from error
    return model


def build_empty(
    auto: Any, source: str, dtype: torch.dtype, attention: str, options: dict[str, Any] | None = None
) -> nn.Module:
    """The same model without values: parameters on the meta device, buffers real."""
    return _on_meta(auto, load_config(source), "model = ", options, dtype=dtype, attn_implementation=attention)


def is_path(source: str) -> bool:
    """Whether `source` can only be meant as a folder, not as a hub id."""
    return source.startswith((".", "/", "~", "models/", "runs/")) or source.count("/") > 1


def check_source(source: str, field: str = "model = ") -> None:
    """Refuse a path that is no folder before the hub is asked for it."""
    if is_path(source) and not Path(source).is_dir():
        raise UserError(f"{field}{source}: no such folder; see `neuroada fetch model --help`")
