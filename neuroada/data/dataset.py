"""Encoded sources as what a training loop asks for: items, their lengths, and the batch of each step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from neuroada.data.encoding import Tokens
from neuroada.data.mixing import Order
from neuroada.data.packing import fill
from neuroada.data.storage import Store


@dataclass(frozen=True)
class Part:
    """The units of one store that are used, and how they lie together.

    Item i holds the units members[offsets[i] : offsets[i + 1]] of the store.
    """

    store: Store
    offsets: np.ndarray  # [items + 1] int64
    members: np.ndarray  # [units] int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[items] int64: sums of the store's per-unit `values`."""
        return np.add.reduceat(values[self.members], self.offsets[:-1]) if len(self) else np.zeros(0, np.int64)


class TokenData:
    """Items in the order of training. An item is a unit (a sequence, or a preference pair) or, filled, several.

    lengths, num_answer_tokens: [items] int64, tokens of each item and those of them that carry a loss.
    """

    def __init__(self, parts: Sequence[Part], order: Order) -> None:
        self.parts, self.order = list(parts), order
        self.firsts = np.cumsum([0, *map(len, parts)])
        self.lengths = np.concatenate([part.sums(part.store.lengths) for part in parts])
        self.num_answer_tokens = np.concatenate([part.sums(part.store.learnt_lengths) for part in parts])

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def units(self) -> np.ndarray:
        """[items] int64: units of each item; of preference data, pairs."""
        return np.concatenate([np.diff(part.offsets) for part in self.parts])

    @cached_property
    def chosen_tokens(self) -> np.ndarray:
        """[items] int64, of preference data: tokens of the chosen answers of each item."""
        return np.concatenate([part.sums(part.store.learnt_counts[::2].astype(np.int64)) for part in self.parts])

    def __str__(self) -> str:
        """How many, and what was left out."""
        sequences = sum(len(part.members) * part.store.facts.unit for part in self.parts)
        said = [
            f"{sequences:,} sequences, {int(self.lengths.sum()):,} tokens, {int(self.num_answer_tokens.sum()):,} learnt"
        ]
        for part in self.parts:
            facts = part.store.facts
            said += [f"{count:,} {why}" for why, count in facts.dropped.items()]
            counted = {"truncated": facts.truncated, "divided": facts.split, "bad rows skipped": facts.skipped}
            said += [f"{count:,} {what}" for what, count in counted.items() if count]
        return "; ".join(said)

    def sequences(self, item: int) -> list[Tokens]:
        """The sequences of an item, in order; of a preference pair the chosen one first. Views of the files."""
        number = int(np.searchsorted(self.firsts, item, side="right")) - 1
        part = self.parts[number]
        at = item - int(self.firsts[number])
        units = part.members[part.offsets[at] : part.offsets[at + 1]]
        return [one for unit in units for one in part.store.unit(int(unit))]

    def batch(self, step: int, size: int) -> np.ndarray:
        """The items of optimizer step `step` (from 0): [size]."""
        return self.order.batch(step, size)


def make_parts(stores: Iterable[Store], used: Iterable[np.ndarray | None], budget: int | None) -> list[Part]:
    """A part of each store. used: the units, None for all; budget: tokens that an item is filled up to, or None."""
    parts = []
    for store, units in zip(stores, used, strict=True):
        units = np.arange(len(store)) if units is None else units
        if budget is None:
            offsets, members = np.arange(len(units) + 1), units
        else:
            offsets, chosen = fill(store.lengths[units], budget)
            members = units[chosen]
        parts.append(Part(store, offsets, members))
    return parts


def hold_out(stores: Sequence[Store], size: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(units for training, units held out) of each store: `size` source rows, drawn over all stores, with all that was
    made from them."""
    rows = [np.unique(store.unit_rows) for store in stores]
    total = sum(map(len, rows))
    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng([seed, 0x0EA1]).permutation(total)[:size]] = True
    train, held = [], []
    first = 0
    for store, own in zip(stores, rows, strict=True):
        taken = np.isin(store.unit_rows, own[chosen[first : first + len(own)]])
        held.append(np.flatnonzero(taken))
        train.append(np.flatnonzero(~taken))
        first += len(own)
    return train, held
