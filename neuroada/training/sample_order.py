"""Which rank computes which examples of an optimizer step."""

from collections.abc import Iterator

import numpy as np

from neuroada.config.recipe import Recipe


def share(batch: np.ndarray, lengths: np.ndarray, rank: int, world_size: int, micro: int) -> Iterator[np.ndarray]:
    """This rank's micro batches of a global batch, as example numbers.

    By length, dealt like cards: micro batches hold sequences of like length, and ranks like amounts of work.
    """
    by_length = batch[np.argsort(lengths[batch], kind="stable")]
    mine = by_length[rank::world_size]
    for start in range(0, len(mine), micro):
        yield mine[start : start + micro]


def passes(
    recipe: Recipe, batch: np.ndarray, lengths: np.ndarray, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """This rank's forward passes of a global batch: (examples, the examples over which their loss is averaged, and how
    much that average counts). Whatever the world size, the parts add up to the same loss."""
    micro = recipe.micro_batch(world_size)
    if recipe.train.loss_average == "batch":
        for chosen in share(batch, lengths, rank, world_size, micro):
            yield chosen, batch, 1.0
        return
    for start in range(rank * micro, len(batch), world_size * micro):
        first = start - start % recipe.averaged
        yield batch[start : start + micro], batch[first : first + recipe.averaged], recipe.averaged / len(batch)
