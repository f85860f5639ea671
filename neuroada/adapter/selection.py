"""Phase 1's rules, under the names their users import them by."""

import torch

from neuroada.errors import UserError
from neuroada.ops.selection import FROM_EXAMPLES, FROM_WEIGHTS, NEEDS, Selection, low_rank, select_top_k, wanda_scores

__all__ = ["FROM_EXAMPLES", "FROM_WEIGHTS", "NEEDS", "Selection", "lift_scores", "select_top_k", "wanda_scores"]


def lift_scores(weight: torch.Tensor, rank: int, name: str, field: str = "lift_rank = ") -> torch.Tensor:
    """`low_rank` of the whole weight [out, in] of the layer `name`.

    UserError: a rank that leaves the weight as it is; values that are not finite.
    """
    if rank >= (most := min(weight.shape)):
        raise UserError(f"{field}{rank}: {name} has rank {most} at most; choose a lower one, or leave that layer out")
    if not torch.isfinite(weight).all():
        raise UserError(f"{name}.weight holds values that are not finite: the base checkpoint is damaged")
    return low_rank(weight, rank)
