"""Cross-entropy over the answer tokens of a micro batch."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from neuroada.objectives.micro_batch import MicroBatch

CHUNK = 2**24
"""Logits turned into fp32 at once: 64 MiB of them."""


def answer_loss(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy summed over this micro batch's answer tokens, fp32.

    Logits exist only at the positions that carry a loss, and are compared in fp32.
    """
    logits = model(**batch.inputs, use_cache=False).logits
    return cross_entropy_sum(logits.flatten(0, 1), batch.targets.flatten())


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy, in fp32. Where a gradient is wanted, `logits` are overwritten: they hold it afterwards.

    logits [positions, vocabulary]; targets [positions] int64, -100 where there is no loss -> scalar fp32 (float64 for
    float64).

    The logits of a step are its largest tensor where the vocabulary is large. By autograd, their fp32 copy, its
    log-softmax and the gradient of each would be alive beside them; here nothing is but a chunk.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        total, _ = _CrossEntropySum.apply(logits, targets)
        return total
    return _sum(logits, targets, gradient=False)


class _CrossEntropySum(torch.autograd.Function):
    """The second output is the first input, overwritten: so autograd knows, and refuses a graph that still needs it."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = _sum(logits, targets, gradient=True)
        ctx.mark_dirty(logits)
        ctx.mark_non_differentiable(logits)
        ctx.save_for_backward(logits)
        return total, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None


def _sum(logits: torch.Tensor, targets: torch.Tensor, gradient: bool) -> torch.Tensor:
    """The sum, chunk by chunk; with `gradient`, the logits are replaced by their gradient."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=logits.device)
    rows = max(1, CHUNK // logits.shape[1])
    for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
        scored = (target != -100)[:, None]
        column = target.clamp(min=0)[:, None]
        values = part.to(wide)  # the logits themselves where they are fp32
        norm = values.logsumexp(1, keepdim=True)
        total += ((norm - values.gather(1, column)) * scored).sum()
        if gradient:  # softmax - 1 at the target
            values.sub_(norm).exp_().scatter_add_(1, column, -torch.ones_like(norm)).mul_(scored)
            part.copy_(values)
    return total
