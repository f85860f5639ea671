"""A model's folder, checked before transformers opens it, and what transformers made of it, checked afterwards.

transformers gives a parameter that the files lack random values, and says so in a log. Here that is an error.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from neuroada.errors import UserError
from neuroada.files import StoredTensor, check_inside, check_schema, open_regular, read_json, weight_files
from neuroada.files.names import match

AGAIN = "fetch the model again, or save it with save_pretrained"
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_LAYERS, MAX_WIDTH, MAX_VOCABULARY = 2_000, 1 << 20, 1 << 24

Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)] | None
Dropout = Annotated[float, Field(ge=0, lt=1)] | None


class ModelConfig(BaseModel):
    """The fields of a config.json that sizes and code are chosen by; others are the model's own."""

    model_config = ConfigDict(strict=True)

    model_type: Annotated[str, Field(pattern=r"^[\w.-]{1,80}$")]
    hidden_size: Width = None
    intermediate_size: Width = None
    num_attention_heads: Width = None
    num_key_value_heads: Width = None
    head_dim: Width = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] | None = None
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)] | None = None
    attention_dropout: Dropout = None
    attention_probs_dropout_prob: Dropout = None
    hidden_dropout_prob: Dropout = None
    attn_pdrop: Dropout = None
    embd_pdrop: Dropout = None
    resid_pdrop: Dropout = None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, with its sizes in bounds. UserError: missing, not JSON, not an object, odd sizes."""
    path = folder / "config.json"
    check_inside(folder, path)
    values = read_json(path, remedy=AGAIN)
    check_schema(ModelConfig, values, str(path), AGAIN)
    found: dict[str, Any] = values
    return found


def check_model_folder(folder: Path, field: str) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """(config.json, the weights by name) of a folder in which every file of the model is whole and its own.

    UserError: as of `read_config` and `weight_files`; weights in an integer dtype; a link that leads out of the folder.
    """
    config = read_config(folder)
    for path in sorted(folder.glob("*.json")):
        check_inside(folder, path)
    stored = weight_files(folder, field)
    for name, tensor in stored.items():
        if name.endswith(".weight") and tensor.dtype not in FLOATS and "quantization_config" not in config:
            raise UserError(
                f"{field}{folder}: {name} is {tensor.dtype}, not one of {', '.join(FLOATS)}; give the model unquantised"
            )
    return config, stored


def check_shapes(model: nn.Module, stored: Mapping[str, StoredTensor], told: str, free: Iterable[str] = ()) -> None:
    """UserError where a parameter of `model`, on the meta device, has another shape in the files.

    free: modules at the top whose parameters may differ, such as another task's classifier.
    """
    for name, param in model.named_parameters():
        found = match(name, stored)
        if found is None or name.split(".")[0] in free or not isinstance(param, nn.Parameter):
            continue
        if tuple(param.shape) != stored[found].shape:
            raise UserError(
                f"{told}: {found} is {list(stored[found].shape)} in {stored[found].file.name}, {list(param.shape)} by "
                f"config.json; {AGAIN}"
            )


def check_found(info: Mapping[str, Any], told: str, free: Iterable[str] = ()) -> None:
    """UserError where transformers' loading info tells of parameters that the files lack. free: as in check_shapes."""
    allowed = tuple(f"{name}." for name in free)
    if missing := sorted(name for name in info.get("missing_keys", ()) if not name.startswith(allowed)):
        raise UserError(
            f"{told}: its files lack {len(missing)} of the model's tensors, {missing[0]} among them; {AGAIN}"
        )


def check_finite(parameters: Iterable[tuple[str, torch.Tensor]], told: str) -> None:
    """UserError where a tensor holds NaN or infinity. Of sharded parameters, give this rank's part."""
    for name, value in parameters:
        if not all_finite(value.detach()):
            raise UserError(f"{told}: {name} holds NaN or infinity: the checkpoint is damaged; {AGAIN}")


def all_finite(value: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. Both extremes take NaN over, and are found faster than a look at each."""
    if not value.is_floating_point() or value.is_meta or not value.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(value))).all())


def sample_weights(folder: Path) -> str | None:
    """A checksum of every tensor's name, dtype, shape and a few of its bytes: other weights in the same folder differ.

    None where `folder` is no folder here, but a hub id.
    """
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(weight_files(folder, "model = ").items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        with open_regular(tensor.file) as file:
            for part in range(16):
                file.seek(tensor.start + part * max(0, tensor.size - 64) // 15)
                digest.update(file.read(min(64, tensor.size)))
    return digest.hexdigest()[:16]


def first_line(error: BaseException) -> str:
    """An error of another library in a message: its first line that says something, at most 200 characters."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
