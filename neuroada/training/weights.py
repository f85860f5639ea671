"""Reading a safetensors checkpoint by rows: each rank takes from the files what it keeps, and no more."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import nn

from neuroada import sharding
from neuroada.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def checkpoint_folder(source: str) -> Path:
    """The folder of a model's safetensors files: the given one, or the hub's, downloaded once."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"model = {source}: cannot be fetched: {str(error).splitlines()[0]}") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor of a checkpoint."""
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    if not (folder / SINGLE).is_file():
        raise UserError(f"model = {folder}: holds neither {INDEX} nor {SINGLE}")
    with safe_open(folder / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)


def fill(params: Iterable[tuple[str, nn.Parameter]], files: dict[str, Path]) -> None:
    """Read this rank's rows of every parameter, by its name in the checkpoint, in the parameter's dtype."""
    for name, param in params:
        if name not in files:
            raise UserError(f"model: the checkpoint has no tensor {name}; its files do not match its config.json")
        try:
            with safe_open(files[name], framework="pt") as file:
                source = file.get_slice(name)
                if tuple(source.get_shape()) != tuple(sharding.shape(param)):
                    raise UserError(
                        f"model: {name} is {tuple(source.get_shape())} in {files[name].name}, "
                        f"{tuple(sharding.shape(param))} by config.json"
                    )
                rows = sharding.layout(param).rows(param) or slice(0, sharding.shape(param)[0])
                sharding.write_rows(param, rows, source[rows.start : rows.stop].to(param.dtype))
        except OSError as error:
            raise UserError(f"model: {files[name]}: {error}") from None
