"""Edits of a tensor as its rows pass by, from file to file: at an adapter's connections, or of the whole."""

import torch

from neuroada.ops import adapted, read_entries, unpack_indices, write_entries


class Entries:
    """An edit that sets k entries of each row of a weight to base + delta, and keeps the values it replaces.

    idx [out, 2k] uint8; base [out, k], None: as found; delta [out, k], None: zero. `replaced` is [out, k], in the
    weight's dtype, once all rows passed.
    """

    def __init__(
        self, idx: torch.Tensor, *, base: torch.Tensor | None = None, delta: torch.Tensor | None = None
    ) -> None:
        self.idx, self.base, self.delta = idx, base, delta
        self.replaced = torch.empty(0)

    def __call__(self, first: int, rows: torch.Tensor) -> None:
        here = slice(first, first + len(rows))
        if first == 0:
            self.replaced = torch.empty(len(self.idx), self.idx.shape[1] // 2, dtype=rows.dtype)
        idx = unpack_indices(self.idx[here])
        self.replaced[here] = read_entries(rows, idx)
        values = self.replaced[here] if self.base is None else self.base[here]
        write_entries(rows, idx, values if self.delta is None else adapted(values, self.delta[here]))


class ExpertEntries:
    """The same of a tensor [experts, out, in], or [experts, in, out] if `transposed`.

    idx [experts, out, 2k] uint8; base, delta and `replaced` [experts, out, k].
    """

    def __init__(
        self,
        idx: torch.Tensor,
        *,
        base: torch.Tensor | None = None,
        delta: torch.Tensor | None = None,
        transposed: bool,
    ) -> None:
        self.idx, self.base, self.delta, self.transposed = idx, base, delta, transposed
        self.replaced = torch.empty(0)

    def __call__(self, first: int, experts: torch.Tensor) -> None:
        if first == 0:
            self.replaced = torch.empty(*self.idx.shape[:2], self.idx.shape[2] // 2, dtype=experts.dtype)
        for expert, matrix in enumerate(experts, first):
            base, delta = (None if part is None else part[expert] for part in (self.base, self.delta))
            edit = Entries(self.idx[expert], base=base, delta=delta)
            edit(0, matrix.t() if self.transposed else matrix)
            self.replaced[expert] = edit.replaced


class Whole:
    """An edit that replaces a tensor, rounded to its stored dtype, and keeps the old one."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = torch.atleast_1d(value)
        self.replaced = torch.empty(0)

    def __call__(self, first: int, rows: torch.Tensor) -> None:
        here = slice(first, first + len(rows))
        if first == 0:
            self.replaced = torch.empty(self.value.shape, dtype=rows.dtype)
        self.replaced[here] = rows
        rows.copy_(self.value[here])
