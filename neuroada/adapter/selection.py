"""Phase 1: which k input connections of each neuron are trained.

Every rule gives each connection an integer key, unique in its row, and keeps the k largest: ties between equal weights
(frequent in bf16) go to the lower column. So the choice is the same on every device, in every process, and for any cut
of the rows.
"""

from typing import Literal

import torch

Selection = Literal["magnitude", "gradient", "reverse", "random"]

CHUNK = 1 << 24  # elements whose keys stand in memory at once: 128 MB of int64


def select_top_k(
    scores: torch.Tensor, k: int, selection: Selection, *, first_row: int = 0, seed: int = 0
) -> torch.Tensor:
    """The chosen columns of each row, ascending: [rows, in] floating point -> [rows, k] int64.

    magnitude: the largest |scores| (of weights); gradient: the same, of a gradient; reverse: the smallest; random: by
    `seed` and the position (`first_row` + row, column) alone, so that a rank can choose for its own rows.
    """
    rows_at_once = max(1, CHUNK // scores.shape[1])
    chosen = [
        _keys(part, selection, first_row + start, seed).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        for start, part in _chunks(scores, rows_at_once)
    ]
    return torch.cat(chosen) if chosen else torch.empty(0, k, dtype=torch.int64, device=scores.device)


def _chunks(scores: torch.Tensor, size: int) -> list[tuple[int, torch.Tensor]]:
    return [(start, scores[start : start + size]) for start in range(0, len(scores), size)]


def _keys(scores: torch.Tensor, selection: Selection, first_row: int, seed: int) -> torch.Tensor:
    """[rows, in] int64, unique in each row: a rank of 47 bits above 16 bits of reversed column number."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    if selection == "random":
        rows = torch.arange(first_row, first_row + len(scores), device=scores.device)[:, None]
        strength = _hash((rows << 16) + columns, seed) & 0x7FFF_FFFF
    else:
        # A non-negative float's bits, read as an integer, are in the order of its value.
        strength = scores.abs().float().view(torch.int32).long()
        if selection == "reverse":
            strength = 0x7FFF_FFFF - strength
    return (strength << 16) + (0xFFFF - columns)


def _hash(x: torch.Tensor, seed: int) -> torch.Tensor:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014) in wrapping int64: the same bits on every device."""
    x = x + (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % (1 << 63)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        # Arithmetic shifts would smear the sign bit: clear what they bring in.
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
