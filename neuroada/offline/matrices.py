"""A quantised matrix on its way from file to file, where an adapter joins it: made dense, or quantised as it was."""

from collections.abc import Iterable
from typing import Any

import torch

from neuroada.ops import adapted, read_entries, unpack_indices, write_entries
from neuroada.ops.selection import select_top_k
from neuroada.quantised import PackedRows


class Matrix:
    """Rows as they are stored, [., bytes of a row] uint8 if `packed`, else floating point that is not quantised yet.

    connections: idx [out, 2k] uint8 and delta [out, k]; None: none. `base` [out, k]: the values in `dtype` that the
    adapter was trained over, once all rows passed.
    """

    def __init__(self, rows: PackedRows, packed: bool, connections: Any, dtype: torch.dtype) -> None:
        self.rows, self.packed, self.dtype = rows, packed, dtype
        self.idx: Any
        self.delta: Any
        self.idx, self.delta = connections or (None, None)
        self.base = torch.empty(0) if connections is None else torch.empty(self.delta.shape, dtype=dtype)

    def read(self, first: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(packed rows, the same dequantised), noting `base`."""
        stored = rows if self.packed else self.rows.encode(rows)
        weight = self.rows.decode(stored, self.dtype)
        if self.idx is not None:
            here = slice(first, first + len(rows))
            self.base[here] = read_entries(weight, unpack_indices(self.idx[here]))
        return stored, weight

    def adapt(self, first: int, weight: torch.Tensor) -> torch.Tensor:
        """`weight` with the deltas added in place."""
        if self.idx is not None:
            here = slice(first, first + len(weight))
            idx = unpack_indices(self.idx[here])
            write_entries(weight, idx, adapted(read_entries(weight, idx), self.delta[here]))
        return weight


class Dense(Matrix):
    """Made dense. original: the deltas go into the original rows. error, norm: squared, of quantisation and rows."""

    def __init__(
        self, rows: PackedRows, packed: bool, connections: Any, dtype: torch.dtype, original: bool = False
    ) -> None:
        super().__init__(rows, packed, connections, dtype)
        self.original = original
        self.error = self.norm = 0.0

    def __call__(self, first: int, rows: torch.Tensor) -> torch.Tensor:
        _, weight = self.read(first, rows)
        if not self.packed:
            self.error += float((weight.float() - rows.float()).square().sum())
            self.norm += float(rows.float().square().sum())
        return self.adapt(first, rows.clone() if self.original else weight)


class Repacked(Matrix):
    """Quantised as it is, codes and scales to the bit, with `exact` exact entries a row: those that it had, those that
    the adapter trained, and where these are fewer, more of the row, lowest column first, at their dequantised value.

    Values are bf16, as a run in bf16 computes with them. `needed` says how many entries suffice.
    """

    def __init__(self, rows: PackedRows, packed: bool, connections: Any, exact: int = 0) -> None:
        super().__init__(rows, packed, connections, torch.bfloat16)
        self.exact = exact

    def __call__(self, first: int, rows: torch.Tensor) -> torch.Tensor:
        stored, weight = self.read(first, rows)
        if self.idx is None and self.exact == self.rows.quantisation.exact:
            return stored
        wanted = self._exact_columns(stored)
        if self.idx is not None:
            wanted = torch.cat([wanted, unpack_indices(self.idx[first : first + len(rows)])], 1)
        marked = torch.zeros(weight.shape, dtype=torch.int32).scatter_(1, wanted, self.rows.inputs)
        keys = marked.sub_(torch.arange(self.rows.inputs, dtype=torch.int32))  # distinct in a row
        columns = keys.topk(self.exact, 1).indices.sort(1).values
        return self.rows.with_entries(stored, columns, read_entries(self.adapt(first, weight), columns))

    def needed(self, parts: Iterable[tuple[int, torch.Tensor]]) -> int:
        """The most entries that any row's exact ones and its connections are together. parts: (first row, rows)."""
        had = most = self.rows.quantisation.exact
        for first, rows in parts if self.idx is not None else ():
            columns = self._exact_columns(rows) if self.packed else self._largest(rows)
            is_exact = torch.zeros(len(rows), self.rows.inputs, dtype=torch.bool).scatter_(1, columns, True)
            new = ~is_exact.gather(1, unpack_indices(self.idx[first : first + len(rows)]))
            most = max(most, had + int(new.sum(1).max()))
        return most

    def _exact_columns(self, stored: torch.Tensor) -> torch.Tensor:
        return self.rows.exact_entries(stored)[0]

    def _largest(self, rows: torch.Tensor) -> torch.Tensor:
        """The exact columns that rows will have once they are quantised."""
        exact = self.rows.quantisation.exact
        return select_top_k(rows, exact, "magnitude") if exact else torch.empty(len(rows), 0, dtype=torch.int64)
