"""Where an adapter's entries lie in the weight that a receiver holds: whole, or a shard along rows or columns."""

from dataclasses import dataclass

import torch

from neuroada.errors import UserError

BITS = {2: torch.int16, 4: torch.int32}
"""The integers that carry a value's bits: equality is of bits, and on CPU integers scatter much faster than bf16."""


@dataclass(frozen=True)
class Shard:
    """This process's part of a weight [out, in] that tensor parallelism splits evenly.

    dim 0 splits rows (output features: "colwise" in a Hugging Face plan), dim 1 columns ("rowwise").
    """

    dim: int
    rank: int
    size: int


@dataclass(frozen=True)
class Entries:
    """The entries of one part of an adapter that lie in this receiver's weight.

    flat [n] int64: positions in the weight's memory. source [n] int64: which of the part's entries, row by row, they
    are; None for all of them.
    """

    flat: torch.Tensor
    source: torch.Tensor | None

    def choose(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, k] of the part -> [n], those that lie here."""
        values = values.reshape(-1)
        return values if self.source is None else values[self.source.to(values.device)]


def block(name: str, shape: tuple[int, int], shard: Shard | None) -> tuple[slice, slice]:
    """The rows and columns of a weight of `shape` [out, in] that stand here."""
    bounds = [slice(0, shape[0]), slice(0, shape[1])]
    if shard is not None:
        each, rest = divmod(shape[shard.dim], shard.size)
        if rest:
            raise UserError(f"{name}: {shape[shard.dim]} does not divide into {shard.size} shards along {shard.dim}")
        bounds[shard.dim] = slice(shard.rank * each, (shard.rank + 1) * each)
    return bounds[0], bounds[1]


def locate(idx: torch.Tensor, first_row: int, rows: slice, columns: slice) -> Entries:
    """idx [rows of the part, k] int64, columns of the whole weight -> the entries inside `rows` and `columns`."""
    row = torch.arange(first_row, first_row + len(idx), device=idx.device)[:, None]
    flat = ((row - rows.start) * (columns.stop - columns.start) + (idx - columns.start)).flatten()
    inside = (row >= rows.start) & (row < rows.stop) & (idx >= columns.start) & (idx < columns.stop)
    if inside.all():
        return Entries(flat, None)
    source = inside.flatten().nonzero().squeeze(1)
    return Entries(flat[source], source)


def read(weight: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """The weight's values at flat positions [n]."""
    bits = weight.detach().view(BITS[weight.element_size()]).view(-1)
    return bits.index_select(0, flat).view(weight.dtype)


def write(weight: torch.Tensor, flat: torch.Tensor, values: torch.Tensor) -> None:
    """Set the weight's values at flat positions [n], in place and unseen by autograd; values of the weight's dtype."""
    bits = BITS[weight.element_size()]
    weight.data.view(bits).view(-1).scatter_(0, flat, values.to(weight.device).contiguous().view(bits))
