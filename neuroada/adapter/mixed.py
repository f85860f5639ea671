"""Batches whose rows want different adapters: `model(..., adapter_names=["a", "__base__", ...])`.

The names belong to one pass of one thread, so they travel in a context variable, never in the model.
"""

import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F

from neuroada.adapter.base_weight import BaseWeight
from neuroada.ops import adapted, in_weight_linear, read_entries, unpack_indices, write_entries

BASE = "__base__"
passes = 0
"""How many mixed passes run now, in any thread: while there is none, layers do not look further."""
_lock = threading.Lock()


class Mixture:
    """The adapter of each row of the batch."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)

    def of(self, carried: Container[str]) -> list[str]:
        """The adapters among the rows' that a layer carries."""
        return [name for name in dict.fromkeys(self.names) if name in carried]

    def groups(self, carried: Container[str], batch: int) -> dict[str, list[int]]:
        """Adapter (`BASE`: none that the layer carries) -> its rows, in a batch that may repeat every row (beams)."""
        repeats, rest = divmod(batch, len(self.names))
        if rest or not repeats:
            raise ValueError(f"adapter_names: {len(self.names)} names for a batch of {batch} rows; give one a row")
        found: dict[str, list[int]] = {}
        for row in range(batch):
            name = self.names[row // repeats]
            found.setdefault(name if name in carried else BASE, []).append(row)
        return found


Connections = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""adapter -> idx_bytes [out, 2k], delta [out, k]"""
_current: ContextVar[Mixture | None] = ContextVar("neuroada_mixture", default=None)


def current() -> Mixture | None:
    return _current.get()


@contextmanager
def mixture(names: Iterable[str]) -> Iterator[None]:
    """While the block runs, passes of this thread are mixed."""
    global passes
    with _lock:
        passes += 1
    token = _current.set(Mixture(names))
    try:
        yield
    finally:
        _current.reset(token)
        with _lock:
            passes -= 1


def product(x: torch.Tensor, mixture: Mixture, base: BaseWeight, connections: Connections) -> torch.Tensor:
    """x [batch, ..., in] -> [batch, ..., out], each row's by its adapter's idx_bytes and delta."""
    groups = mixture.groups(connections, len(x))
    if torch.is_grad_enabled() and (x.requires_grad or any(delta.requires_grad for _, delta in connections.values())):
        parts = [_one(x[rows], name, base, connections) for name, rows in groups.items()]
        order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
        y = torch.empty(len(x), *parts[0].shape[1:], dtype=parts[0].dtype, device=x.device)
        return y.index_copy(0, order, torch.cat(parts))
    found: torch.Tensor | None = None
    for rows, part in _without_gradients(x, groups, base, connections):
        if found is None:
            found = part.new_empty(len(x), *part.shape[1:])
        found[rows] = part  # at once: the parts of a long batch together would not stay in the caches
    assert found is not None
    return found


def _one(x: torch.Tensor, name: str, base: BaseWeight, connections: Connections) -> torch.Tensor:
    if name == BASE:
        weight = base.format.matrix(base.stored)
        return F.linear(x, base.format.scratch(base.stored) if weight is None else weight, base.bias)
    return in_weight_linear(x, base.stored, base.bias, *connections[name], base.format)


def _without_gradients(
    x: torch.Tensor,
    groups: dict[str, list[int]],
    base: BaseWeight,
    connections: Connections,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """One scratch weight for the batch: each adapter's entries are written into it, and put back after its rows.

    -> rows, and their outputs.
    """
    scratch = base.format.scratch(base.stored)
    for name, rows in groups.items():
        part = x[rows]
        if name == BASE:
            yield rows, F.linear(part, scratch.to(part.dtype), base.bias)
            continue
        idx_bytes, delta = connections[name]
        idx = unpack_indices(idx_bytes)
        replaced = read_entries(scratch, idx)
        write_entries(scratch, idx, adapted(replaced, delta))
        yield rows, F.linear(part, scratch.to(part.dtype), base.bias)
        write_entries(scratch, idx, replaced)
