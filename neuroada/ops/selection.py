"""Phase 1: which k input connections of each neuron are trained.

Every rule gives each connection an integer key, unique in its row, and keeps the k largest: ties between equal weights
(frequent in bf16) go to the lower column. So the choice is the same on every device, in every process, and for any cut
of the rows.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F

Selection = Literal["magnitude", "gradient", "reverse", "random", "wanda", "lift"]
Needs = Literal["row", "matrix", "activations", "gradient"]

NEEDS: dict[Selection, Needs] = {
    "magnitude": "row",
    "reverse": "row",
    "random": "row",
    "lift": "matrix",
    "wanda": "activations",
    "gradient": "gradient",
}
"""What a rule looks at: each row of the weight alone; the whole weight; or the weight and what training examples do in
the layer, forward (activations) or forward and backward (gradient)."""

FROM_WEIGHTS: tuple[Selection, ...] = tuple(rule for rule in get_args(Selection) if NEEDS[rule] in ("row", "matrix"))
FROM_EXAMPLES: tuple[Selection, ...] = tuple(rule for rule in get_args(Selection) if rule not in FROM_WEIGHTS)

# Elements whose keys stand in memory at once: on a CPU what its cache holds, on a device enough to fill it.
CPU_CHUNK, DEVICE_CHUNK = 1 << 19, 1 << 24


def select_top_k(
    scores: torch.Tensor, k: int, selection: Selection, *, first_row: int = 0, seed: int = 0
) -> torch.Tensor:
    """The chosen columns of each row, ascending: [rows, in] floating point -> [rows, k] int64.

    reverse: the smallest |scores|; random: by `seed` and the position (`first_row` + row, column) alone, so that a rank
    can choose for its own rows; every other rule: the largest |scores|, whatever they are of: the weight, its gradient,
    `low_rank` of it, or `wanda_scores`.
    """
    chunk = CPU_CHUNK if scores.device.type == "cpu" else DEVICE_CHUNK
    rows_at_once = max(1, chunk // scores.shape[1])
    chosen = [
        _top_columns(_keys(scores[start : start + rows_at_once], selection, first_row + start, seed), k)
        for start in range(0, len(scores), rows_at_once)
    ]
    return torch.cat(chosen) if chosen else torch.empty(0, k, dtype=torch.int64, device=scores.device)


def low_rank(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation of that rank, by singular values: [out, in] floating point -> [out, in] fp32.

    LIFT's scores (Liu et al., 2025, arXiv 2506.00772). From the eigenvectors of the smaller of W.T W and W W.T, in
    float64: three copies of the weight's elements at 8 bytes, and less time than a whole decomposition.
    """
    values = weight.double()
    tall = values.shape[0] >= values.shape[1]
    vectors = torch.linalg.eigh(values.T @ values if tall else values @ values.T).eigenvectors[:, -rank:]
    found = (values @ vectors) @ vectors.T if tall else vectors @ (vectors.T @ values)
    return found.float()


def wanda_scores(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """|w| x the L2 norm of the input it meets: [rows, in], [in] float64 sums of squares -> [rows, in] fp32.

    Wanda's scores (Sun et al., 2023, arXiv 2306.11695).
    """
    return weight.float().abs() * squares.sqrt().float()


def _top_columns(keys: torch.Tensor, k: int) -> torch.Tensor:
    """The columns of the k largest keys of each row, ascending: [rows, in] int32 or int64 -> [rows, k] int64.

    In two steps, ten times faster than one top-k over the row: cut it into groups; as keys are unique, its k largest
    lie in the k groups whose largest key is largest (an element outside has k group maxima above it).
    """
    # Near sqrt(in / k), which balances in / size groups with k * size candidates; a power of two divides most widths.
    size = 1 << round(math.log2(keys.shape[1] / k) / 2)
    if size > 1:
        if missing := -keys.shape[1] % size:
            keys = F.pad(keys, (0, missing), value=-1)
        by_group = keys.view(len(keys), size, -1)  # group g: columns g, g + groups, ...: maxima of contiguous memory
        best = by_group.amax(1).topk(k, dim=1, sorted=False).indices
        keys = by_group.gather(2, best[:, None].expand(-1, size, -1)).flatten(1)
    top = keys.topk(k, dim=1, sorted=False).values
    return (0xFFFF - (top.long() & 0xFFFF)).sort(dim=1).values


def _keys(scores: torch.Tensor, selection: Selection, first_row: int, seed: int) -> torch.Tensor:
    """[rows, in], unique in each row and not negative: a rank above 16 bits of reversed column number.

    int32 for the 15 bits of a half-precision magnitude, int64 for the 31 of a single-precision one.
    """
    reversed_columns = 0xFFFF - torch.arange(scores.shape[1], device=scores.device)
    if selection == "random":
        rows = torch.arange(first_row, first_row + len(scores), device=scores.device)[:, None]
        strength = scramble((rows << 16) + (0xFFFF - reversed_columns), seed) & 0x7FFF_FFFF
        return (strength << 16) + reversed_columns
    # A non-negative float's bits, read as an integer, are in the order of its value; the sign bit is cleared.
    if scores.dtype in (torch.bfloat16, torch.float16):
        keys = scores.view(torch.int16).int().bitwise_left_shift_(16).bitwise_and_(0x7FFF_0000)
        highest, reversed_columns = 0x7FFF_0000, reversed_columns.int()
    else:
        keys = scores.float().view(torch.int32).long().bitwise_left_shift_(16).bitwise_and_(0x7FFF_FFFF_0000)
        highest = 0x7FFF_FFFF_0000
    if selection == "reverse":
        keys = keys.neg_().add_(highest)
    return keys.bitwise_or_(reversed_columns)


def scramble(x: torch.Tensor, seed: int) -> torch.Tensor:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014) in wrapping int64: the same bits on every device."""
    x = x + (seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % (1 << 63)
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        # Arithmetic shifts would smear the sign bit: clear what they bring in.
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
