"""Which examples an optimizer step sees: a function of seed and step alone, for any engine, world size and micro batch.

So the position of a run in its data is its step number, and nothing else need be saved to go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_QUOTA = 1024  # positions over which interleaved sources are apportioned exactly


@dataclass(frozen=True)
class Order:
    """An endless stream of items of one or more sources.

    sizes: items of each source. weights: None for all sources one after the other, each item once an epoch, shuffled
    together; or each source's share of every step, where a source that ends begins again, shuffled anew. block: shuffle
    within so many items only, so that a stream of which only the beginning is known has the same beginning.
    """

    sizes: tuple[int, ...]
    seed: int
    weights: tuple[float, ...] | None = None
    block: int | None = None

    def __len__(self) -> int:
        """Items of an epoch: those of all sources."""
        return sum(self.sizes)

    def batch(self, step: int, size: int) -> np.ndarray:
        """The items of optimizer step `step` (from 0), [size] int64, numbered through all sources."""
        positions = np.arange(step * size, (step + 1) * size)
        if self.weights is None:
            return self._shuffled(positions, len(self), ())
        sources, places = self._apportion(positions)
        firsts = np.cumsum([0, *self.sizes[:-1]])
        found = np.empty(size, dtype=np.int64)
        for source, items in enumerate(self.sizes):
            mine = sources == source
            found[mine] = firsts[source] + self._shuffled(places[mine], items, (source,))
        return found

    def _shuffled(self, positions: np.ndarray, items: int, stream: tuple[int, ...]) -> np.ndarray:
        """Where the positions of an endless shuffled stream over `items` items fall."""
        epochs, places = np.divmod(positions, items)
        found = np.empty(len(positions), dtype=np.int64)
        width = self.block or items
        blocks = places // width
        for epoch, block in {(int(e), int(b)) for e, b in zip(epochs, blocks, strict=True)}:
            mine = (epochs == epoch) & (blocks == block)
            start = block * width
            key = (self.seed, *stream, epoch) if self.block is None else (self.seed, *stream, epoch, block)
            found[mine] = start + _permutation(key, min(width, items - start))[places[mine] - start]
        return found

    def _apportion(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, place in that source's own stream) of each position."""
        sources, places = np.empty_like(positions), np.empty_like(positions)
        blocks = positions // _QUOTA
        for block in np.unique(blocks):
            mine = blocks == block
            chosen, numbers = self._quota(int(block))
            at = positions[mine] - block * _QUOTA
            sources[mine], places[mine] = chosen[at], numbers[at]
        return sources, places

    def _quota(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources of a block's positions, shuffled, and the place of each in its source's stream."""
        assert self.weights is not None
        before, after = (shares(b * _QUOTA, self.weights) for b in (block, block + 1))
        sources = np.repeat(np.arange(len(self.weights)), after - before)
        np.random.default_rng([self.seed, 1 << 32, block]).shuffle(sources)
        places = np.empty_like(sources)
        for source, first in enumerate(before):
            mine = sources == source
            places[mine] = first + np.arange(mine.sum())
        return sources, places


def shares(count: int, weights: tuple[float, ...]) -> np.ndarray:
    """How many of the first `count` positions go to each source: monotone in `count`, and `count` in all."""
    bounds = np.cumsum(np.array(weights, dtype=np.float64)) / sum(weights)
    bounds[-1] = 1.0
    return np.diff(np.floor(count * bounds + 1e-9).astype(np.int64), prepend=0)


@lru_cache(maxsize=8)
def _permutation(key: tuple[int, ...], size: int) -> np.ndarray:
    return np.random.default_rng(list(key)).permutation(size)
