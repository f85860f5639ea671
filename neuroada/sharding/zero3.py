"""ZeRO-3: each rank stores an equal run of the flattened parameter (`ds_tensor`); the last one is padded.

DeepSpeed gathers a module's own parameters around its forward and backward. A tuner has them in child modules whose
forward never runs, so `adopt` registers them with the layer that uses them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


def holds(param: torch.Tensor) -> bool:
    return hasattr(param, "ds_id")


def shape(param: torch.Tensor) -> torch.Size:
    return param.ds_shape  # type: ignore[attr-defined]


def stored(param: torch.Tensor) -> torch.Tensor:
    return param.ds_tensor.data  # type: ignore[attr-defined]


def elements(param: torch.Tensor) -> torch.Tensor:
    part = stored(param).flatten()
    first = dist.get_rank(param.ds_process_group) * len(part)  # type: ignore[attr-defined]
    return part[: max(0, shape(param).numel() - first)]


def rows(param: torch.Tensor) -> slice | None:
    group = param.ds_process_group  # type: ignore[attr-defined]
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    each, left = divmod(shape(param)[0], ranks)
    return None if left else slice(rank * each, (rank + 1) * each)


@contextmanager
def whole(param: torch.Tensor) -> Iterator[torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        yield param.data


def join_rows(param: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if len(values) == shape(param)[0]:
        return values
    group, values = param.ds_process_group, values.contiguous()  # type: ignore[attr-defined]
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values, group=group)
    return torch.cat(parts)


def write_rows(param: torch.Tensor, rows: slice, values: torch.Tensor) -> None:
    values = join_rows(param, values.to(param.dtype))
    # By DeepSpeed's own partition call, so that hpZ's secondary copy, which gathers read, is written too.
    param.all_gather()  # type: ignore[attr-defined]
    param.data.copy_(values)
    param.partition(has_been_updated=True)  # type: ignore[attr-defined]


def own_part(param: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """This rank's part of `values`, whole and shaped like the parameter: flat, the last rank's part padded."""
    size, rank = stored(param).numel(), dist.get_rank(param.ds_process_group)  # type: ignore[attr-defined]
    part = values.flatten()[rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def adopt(module: nn.Module, weight: torch.Tensor, params: list[nn.Parameter]) -> None:
    import deepspeed

    weight.convert_to_zero_parameters(params)  # type: ignore[attr-defined]
    for param in [weight, *params]:
        deepspeed.zero.register_external_parameter(module, param)
