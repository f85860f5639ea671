"""A packed row: sequences end to end, each beginning at position 0."""

from collections.abc import Iterator

import torch


def split_sequences(position_ids: torch.Tensor, *states: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The `states` [., ., tokens, .] of each sequence of the row that position_ids [., tokens] int64 describes."""
    starts = (position_ids[0] == 0).nonzero().flatten()
    lengths = starts.diff(append=starts.new_tensor([position_ids.shape[1]])).tolist()
    return zip(*(state.split(lengths, 2) for state in states), strict=True)
