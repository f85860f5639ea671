"""FSDP2: DTensors sharded along dimension 0, so always in whole rows; the last ranks may have fewer, or none.

Hybrid sharding adds a mesh dimension of replicas (placements Replicate, Shard(0)): ranks at the same place of their
groups store the same rows, and gathering stays inside a group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def holds(param: torch.Tensor) -> bool:
    return isinstance(param, DTensor)


def shape(param: torch.Tensor) -> torch.Size:
    return param.shape


def stored(param: torch.Tensor) -> torch.Tensor:
    return cast(DTensor, param).to_local().detach()


def elements(param: torch.Tensor) -> torch.Tensor:
    return stored(param)  # FSDP2's padding is outside of the local tensor


def rows(param: torch.Tensor) -> slice | None:
    param = cast(DTensor, param)
    local, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return slice(offset[0], offset[0] + local[0]) if local[0] else slice(0, 0)


@contextmanager
def whole(param: torch.Tensor) -> Iterator[torch.Tensor]:
    yield cast(DTensor, param).full_tensor().detach()


def join_rows(param: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    param = cast(DTensor, param)
    size = torch.Size([len(param), *values.shape[1:]])
    stride = torch.empty(size, device="meta").stride()
    joined = DTensor.from_local(values.contiguous(), param.device_mesh, param.placements, shape=size, stride=stride)
    return joined.full_tensor()


def write_rows(param: torch.Tensor, rows_given: slice, values: torch.Tensor) -> None:
    mine = rows(param)
    assert mine is not None
    first = mine.start - rows_given.start
    stored(param).copy_(values[first : first + mine.stop - mine.start])


def adopt(module: nn.Module, weight: torch.Tensor, params: list[nn.Parameter]) -> None:
    # fully_shard cuts the parameters a module has when it is called; later ones would stay whole.
    raise RuntimeError("attach the adapter before fully_shard is called on the model")
