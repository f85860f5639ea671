"""Which sequences an optimizer step sees, and which rank computes which of them.

The samples are one endless stream: a fresh permutation an epoch, drawn from the seed alone, divided into global
batches. Step n always sees the same sequences, for any engine, world size and micro batch: the data position of a run
is its step number.
"""

from collections.abc import Iterator

import numpy as np


def global_batch(step: int, size: int, examples: int, seed: int) -> np.ndarray:
    """The example numbers of optimizer step `step` (from 0): [size]."""
    positions = np.arange(step * size, (step + 1) * size)
    epochs, places = np.divmod(positions, examples)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(examples) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])


def share(batch: np.ndarray, lengths: np.ndarray, rank: int, world_size: int, micro: int) -> Iterator[np.ndarray]:
    """This rank's micro batches of a global batch, as example numbers.

    By length, dealt like cards: micro batches hold sequences of like length, and ranks like amounts of work.
    """
    by_length = batch[np.argsort(lengths[batch], kind="stable")]
    mine = by_length[rank::world_size]
    for start in range(0, len(mine), micro):
        yield mine[start : start + micro]
