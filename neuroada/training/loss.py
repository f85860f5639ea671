"""A micro batch's share of the loss."""

from typing import Any

import torch
from torch import nn

from neuroada.training.batches import MicroBatch

CHUNK = 2**24
"""Logits turned into fp32 at once: 64 MiB of them."""


def answer_loss(model: nn.Module, batch: MicroBatch, answer_tokens: int) -> torch.Tensor:
    """Cross-entropy summed over this micro batch's answer tokens, over the answer tokens of the whole global batch.

    So the parts of all ranks and micro batches add up to the mean over the global batch, however it is divided.
    Logits exist only at the positions that carry a loss, and are compared in fp32.
    """
    logits = model(**batch.inputs, use_cache=False).logits
    return cross_entropy_sum(logits.flatten(0, 1), batch.targets.flatten()) / answer_tokens


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy, in fp32. Uses `logits` up: their memory holds their gradient afterwards.

    logits [positions, vocabulary]; targets [positions] int64, -100 where there is no loss -> scalar fp32 (float64 for
    float64).

    The logits of a step are its largest tensor where the vocabulary is large. By autograd, their fp32 copy, its
    log-softmax and the gradient of each would stand beside them; here nothing does but a chunk.
    """
    return _CrossEntropySum.apply(logits, targets)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=logits.device)
        rows = max(1, CHUNK // logits.shape[1])
        for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
            scored = (target != -100)[:, None]
            column = target.clamp(min=0)[:, None]
            values = part.to(wide)  # the logits themselves where they are fp32: changed in place from here on
            norm = values.logsumexp(1, keepdim=True)
            total += ((norm - values.gather(1, column)) * scored).sum()
            # Softmax - 1 at the target: the gradient.
            values.sub_(norm).exp_().scatter_add_(1, column, -torch.ones_like(norm)).mul_(scored)
            part.copy_(values)
        ctx.save_for_backward(logits)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0]), None
