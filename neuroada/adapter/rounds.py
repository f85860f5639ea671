"""Passes over examples, divided among the ranks; what they find is added up in the order of the passes.

So a sum has the same bits for any number of ranks: those of one process that runs every pass.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F

from neuroada.errors import UserError


class Rounds:
    """The passes in rounds of one on each rank; every rank is given all of them.

    In the last round, ranks that are left without a pass repeat the last one, for an engine gathers weights on all
    ranks at once; what they find is not counted.
    """

    def __init__(self, passes: Sequence[Callable[[], object]]) -> None:
        if not passes:
            raise UserError("connections are to be chosen by examples: give at least one pass over some")
        self.passes = passes
        self.ranks, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.counted = 0  # passes of this round
        self.last = False

    def __iter__(self) -> Iterator[Callable[[], object]]:
        """This rank's pass of each round."""
        for first in range(0, len(self.passes), self.ranks):
            left = len(self.passes) - first
            self.counted, self.last = min(self.ranks, left), left <= self.ranks
            yield self.passes[first + min(self.rank, left - 1)]

    def numbers(self, number: int, device: torch.device) -> set[int]:
        """Of all ranks: one, where they agree. Collective."""
        if self.ranks == 1:
            return {number}
        return {int(said) for said in self._gathered(torch.tensor([number], device=device))}

    def each(self, found: torch.Tensor) -> list[torch.Tensor]:
        """What each pass of this round has found, in their order, from this rank's. Collective."""
        if self.ranks == 1:
            return [found]
        return self._gathered(found)[: self.counted]

    def add_rows(self, total: torch.Tensor | None, found: torch.Tensor) -> torch.Tensor:
        """`total` and what each pass of this round has found in this rank's part of the rows, added up in their order.

        found: of this rank's pass, [rows, .], all of them; it is used up. total: None at first. A part is
        ceil(rows / ranks) rows; the last ranks' are filled up with zeros. Collective: each rank sends and receives
        (ranks - 1) / ranks of `found`.
        """
        if self.ranks == 1:
            return found if total is None else total.add_(found)
        padding = -len(found) % self.ranks
        sent = F.pad(found, (0, 0, 0, padding)) if padding else found.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        first, *others = received.view(self.ranks, -1, found.shape[1])[: self.counted]
        # A copy: a view would keep the other passes' parts in memory.
        total = first.clone() if total is None else total.add_(first)
        for other in others:
            total.add_(other)
        return total

    def join_rows(self, own: torch.Tensor, rows: int) -> torch.Tensor:
        """All `rows` rows, on every rank, of what each made of its part of a sum. Collective."""
        if self.ranks == 1:
            return own
        return torch.cat(self._gathered(own))[:rows]

    def _gathered(self, own: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(parts, own.contiguous())
        return parts
