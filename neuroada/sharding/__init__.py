"""What differs between whole tensors, ZeRO-3 partitions and FSDP2 DTensors, behind nine functions.

A parameter is sharded along its first dimension: a weight's rows are its neurons. Nothing outside this package names
an engine's tensors. The three layouts are the modules `plain`, `zero3` and `dtensor`, each with the same functions.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

import torch
from torch import nn

from neuroada.sharding import dtensor, plain, zero3


def layout(param: torch.Tensor) -> ModuleType:
    """The module that knows how this parameter is stored."""
    return next(module for module in (zero3, dtensor, plain) if module.holds(param))


def is_whole(param: torch.Tensor) -> bool:
    """Whether every row of this parameter stands in this process, always."""
    return layout(param) is plain


def shape(param: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return layout(param).shape(param)


def stored(param: torch.Tensor) -> torch.Tensor:
    """What this rank really stores of the parameter: its bytes are this rank's cost."""
    return layout(param).stored(param)


def elements(param: torch.Tensor) -> torch.Tensor:
    """This rank's elements of the parameter, of whatever shape: `stored` without the padding, whose values are junk."""
    return layout(param).elements(param)


def whole(param: torch.Tensor) -> AbstractContextManager[torch.Tensor]:
    """The whole parameter, for the time of a `with` block, on every rank. Collective; for reading."""
    return layout(param).whole(param)


@contextmanager
def own_rows(param: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, values): the whole rows this rank stores, without communication where its part is whole rows.

    Where a rank's part ends inside a row, all rows, by gathering this one parameter. For reading. The choice is the
    same on every rank, so that it may be used around collective calls.
    """
    rows = layout(param).rows(param)
    if rows is None:
        with whole(param) as values:
            yield slice(0, len(values)), values
    else:
        yield rows, stored(param).view(-1, *shape(param)[1:])[: rows.stop - rows.start]


def join_rows(param: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """All rows, on every rank, of what each rank computed from the rows that `own_rows` gave it of `param`: [rows, .].
    Collective."""
    return layout(param).join_rows(param, values)


def write_rows(param: torch.Tensor, rows: slice, values: torch.Tensor) -> None:
    """Set `rows` of the parameter to `values`. Collective: every rank brings all rows, or every rank the rows that
    `own_rows` gives it of a parameter with as many rows."""
    layout(param).write_rows(param, rows, values)


def adopt(module: nn.Module, weight: torch.Tensor, params: list[nn.Parameter]) -> None:
    """Shard the new, still whole `params` as `weight` is sharded, and bring them all to `module`'s forward pass."""
    layout(weight).adopt(module, weight, params)
