"""Loading a safetensors checkpoint by rows: each rank reads from the files what it stores, and no more."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from neuroada import sharding
from neuroada.errors import UserError
from neuroada.files import open_tensors


def fill(params: Iterable[tuple[str, nn.Parameter]], files: dict[str, Path]) -> None:
    """Read this rank's rows of every parameter, by its name in the checkpoint, in the parameter's dtype.

    `files`: the file that holds each tensor.
    """
    for name, param in params:
        if name not in files:
            raise UserError(f"model: the checkpoint has no tensor {name}; its files do not match its config.json")
        with open_tensors(files[name]) as file:
            source = file.get_slice(name)
            if tuple(source.get_shape()) != tuple(sharding.shape(param)):
                raise UserError(
                    f"model: {name} is {tuple(source.get_shape())} in {files[name].name}, "
                    f"{tuple(sharding.shape(param))} by config.json"
                )
            rows = sharding.layout(param).rows(param) or slice(0, sharding.shape(param)[0])
            sharding.write_rows(param, rows, source[rows.start : rows.stop].to(param.dtype))
