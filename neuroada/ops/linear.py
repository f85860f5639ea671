"""The in-weight bypass: a Linear whose selected connections are set to base + delta where the weight is materialised.

A bypass on selected connections equals a change of those entries of W. So nothing is added to the forward pass: the
entries are assigned (not added: twice is harmless), then the ordinary linear runs.
"""

from typing import Any

import torch
import torch.nn.functional as F

from neuroada.ops.indices import unpack_indices
from neuroada.ops.sampled_gradient import sampled_gradient


def write_entries(
    weight: torch.Tensor, idx_bytes: torch.Tensor, base: torch.Tensor, delta: torch.Tensor | None = None
) -> None:
    """weight[r, idx[r, j]] = base[r, j] + delta[r, j], in place and unseen by autograd; delta None restores the base.

    weight [out, in]; idx_bytes [out, 2k] uint8; base [out, k] in the weight's dtype; delta [out, k], fp32 or wider.
    The sum is rounded once, to the weight's dtype.
    """
    values = base if delta is None else (base + delta.detach()).to(weight.dtype)
    entries = weight.data
    if entries.element_size() == 2:
        # The same bits as integers: on CPU a scatter of bf16 takes two hundred times as long (torch 2.13).
        entries, values = entries.view(torch.int16), values.contiguous().view(torch.int16)
    entries.scatter_(1, unpack_indices(idx_bytes), values)


def keeps_entries(weight: torch.Tensor, delta: torch.Tensor) -> bool:
    """Whether backward keeps of x only its columns at the selected entries, [..., out * k], instead of all.

    So where they are at most half as many: a Llama's down_proj at k = 1, whose input is the widest of its block and
    which nothing else keeps. (Counting repeated columns once would save more, and cost a GPU a wait for the count.)
    """
    return 2 * delta.numel() <= weight.shape[1]


class _InWeightLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        idx_bytes: torch.Tensor,
        base: torch.Tensor,
        delta: torch.Tensor,
    ) -> torch.Tensor:
        write_entries(weight, idx_bytes, base, delta)
        ctx.keeps_entries = keeps_entries(weight, delta)
        kept = x.index_select(-1, unpack_indices(idx_bytes).flatten()) if ctx.keeps_entries else x
        # The Parameters themselves, never views: ZeRO-3 and FSDP2 swap their data and gather it again for backward.
        ctx.save_for_backward(kept, weight, idx_bytes, base, delta)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        kept, weight, idx_bytes, base, delta = ctx.saved_tensors
        dx = dbias = ddelta = None
        if ctx.needs_input_grad[0]:
            # Where the weight was gathered anew its entries are the base's, after a switch another adapter's.
            write_entries(weight, idx_bytes, base, delta)
            dx = dy @ weight
        if ctx.needs_input_grad[2]:
            dbias = dy.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[5]:
            if ctx.keeps_entries:
                columns = torch.arange(delta.numel(), device=dy.device).view(delta.shape)
            else:
                columns = unpack_indices(idx_bytes)
            ddelta = sampled_gradient(dy, kept, columns).to(delta.dtype)
        return dx, None, dbias, None, None, ddelta


def in_weight_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    idx_bytes: torch.Tensor,
    base: torch.Tensor,
    delta: torch.Tensor,
) -> torch.Tensor:
    """y = x @ W'.T + bias, where W' is `weight` with base + delta at the selected entries; W' is left in `weight`.

    x [..., in] -> [..., out]. Gradients reach x, bias and delta; `weight` is frozen and only its selected entries are
    written. Shapes as in `write_entries`.
    """
    return _InWeightLinear.apply(x, weight, bias, idx_bytes, base, delta)
