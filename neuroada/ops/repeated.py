"""Connections that several adapters share."""

import torch

CHUNK = 1 << 22  # comparisons whose results stand in memory at once


def sum_repeated(idx: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The sum of the deltas of each entry's column in its row, at every entry: [rows, k], [rows, k] -> [rows, k].

    So entries that name one column all hold its whole change, and writing them in any order gives the same weight.
    """
    rows_at_once = max(1, CHUNK // max(1, idx.shape[1] ** 2))
    parts = [
        torch.where(i[:, :, None] == i[:, None, :], d[:, None, :], 0).sum(-1)
        for i, d in zip(idx.split(rows_at_once), delta.split(rows_at_once), strict=True)
    ]
    return torch.cat(parts) if parts else torch.zeros_like(delta)
