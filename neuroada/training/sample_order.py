"""Which rank computes which examples of an optimizer step."""

from collections.abc import Iterator

import numpy as np


def share(batch: np.ndarray, lengths: np.ndarray, rank: int, world_size: int, micro: int) -> Iterator[np.ndarray]:
    """This rank's micro batches of a global batch, as example numbers.

    By length, dealt like cards: micro batches hold sequences of like length, and ranks like amounts of work.
    """
    by_length = batch[np.argsort(lengths[batch], kind="stable")]
    mine = by_length[rank::world_size]
    for start in range(0, len(mine), micro):
        yield mine[start : start + micro]
