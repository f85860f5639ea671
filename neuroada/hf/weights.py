"""Loading a safetensors checkpoint by rows: each rank reads from the files what it stores, and no more.

A quantised layer's rows are read from a quantised checkpoint as they are, or quantised as they come from any other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from neuroada import sharding
from neuroada.errors import UserError
from neuroada.files import open_tensors
from neuroada.hf.fused_experts import expert_matrices, in_files, name_in_files, read_experts
from neuroada.quantised import PackedRows, QuantisedLinear


class Wanted(NamedTuple):
    """A parameter and its tensor in the checkpoint. rows: of a quantised layer that is read as floating point."""

    name: str
    param: nn.Parameter
    rows: PackedRows | None = None


def wanted(
    model: nn.Module, prefix: str, files: Mapping[str, Path], has: Callable[[str], bool] = lambda name: True
) -> Iterator[Wanted]:
    """What to read into `model`, with or without an adapter: the parameters whose name `has` accepts.

    prefix: the base model's, such as "roberta.", which the checkpoint of a bare model leaves out.
    """
    for name, param in model.named_parameters():
        if not has(name):
            continue
        stored, rows = _name_in_checkpoint(name, prefix, files), None
        if stored.endswith(".packed") and stored not in files:
            layer = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(layer, QuantisedLinear)
            stored, rows = _name_in_checkpoint(name.removesuffix("packed") + "weight", prefix, files), layer.rows
        yield Wanted(stored, param, rows)


def _name_in_checkpoint(name: str, prefix: str, files: Mapping[str, Path]) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name if in_files(name, files) else name.removeprefix(f"{prefix}.")


def fill(params: Iterable[Wanted], files: dict[str, Path]) -> None:
    """Read this rank's rows of every parameter, in the parameter's dtype. Collective under ZeRO-3.

    `files`: the file that holds each tensor.
    """
    for asked, param, packed in params:
        name = name_in_files(asked, files)
        if name not in files and (matrices := expert_matrices(name, files)) is not None:
            _fill_experts(name, param, matrices, files)
            continue
        if name not in files:
            raise UserError(f"model: the checkpoint has no tensor {name}; its files do not match its config.json")
        with open_tensors(files[name]) as file:
            source, shape = file.get_slice(name), sharding.shape(param)
            expected = tuple(shape) if packed is None else (shape[0], packed.inputs)
            if tuple(source.get_shape()) != expected:
                raise UserError(
                    f"model: {name} is {tuple(source.get_shape())} in {files[name].name}, {expected} by config.json"
                )
            rows = sharding.layout(param).rows(param) or slice(0, shape[0])
            values = source[rows.start : rows.stop]
        sharding.write_rows(param, rows, _converted(values, param, packed, name))


def _converted(values: torch.Tensor, param: nn.Parameter, packed: PackedRows | None, name: str) -> torch.Tensor:
    """Rows of a file as the parameter stores them. UserError: bytes where floating point belongs, or the reverse."""
    if (packed is not None or param.is_floating_point()) != values.is_floating_point():
        raise UserError(f"model: {name} holds {values.dtype}: quantised another way; give the original checkpoint")
    if packed is not None:
        return packed.encode(values.to(sharding.stored(param).device))
    return values.to(param.dtype)


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
