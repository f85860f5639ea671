"""Loading a safetensors checkpoint by rows: each rank reads from the files what it stores, and no more."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from neuroada import sharding
from neuroada.errors import UserError
from neuroada.files import open_tensors
from neuroada.hf.fused_experts import expert_matrices, name_in_files, read_experts


def fill(params: Iterable[tuple[str, nn.Parameter]], files: dict[str, Path]) -> None:
    """Read this rank's rows of every parameter, by its name in the checkpoint, in the parameter's dtype.

    `files`: the file that holds each tensor.
    """
    for wanted, param in params:
        name = name_in_files(wanted, files)
        if name not in files and (matrices := expert_matrices(name, files)) is not None:
            _fill_experts(name, param, matrices, files)
            continue
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


def _fill_experts(name: str, param: nn.Parameter, matrices: list[str], files: dict[str, Path]) -> None:
    """The experts of this parameter that this rank stores, from the matrices of each."""
    count, *expected = sharding.shape(param)
    experts = sharding.layout(param).rows(param) or slice(0, count)
    values = torch.empty(0, *expected)
    if experts.stop > experts.start:
        values = read_experts(matrices, experts, files)
    if list(values.shape[1:]) != expected:
        raise UserError(f"model: {name} is {list(values.shape[1:])} an expert in the files, {expected} by config.json")
    sharding.write_rows(param, experts, values.to(param.dtype))
