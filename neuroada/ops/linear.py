"""The in-weight bypass: a Linear whose selected connections hold base + delta while, and only while, it multiplies.

A bypass on selected connections equals a change of those entries of W. So nothing is added to the forward pass: the
entries are changed in place, the ordinary linear runs, and the entries are put back. The weight keeps the base values
itself; no copy of them is stored, or travels where weights are gathered.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from neuroada.ops.indices import unpack_indices
from neuroada.ops.sampled_gradient import sampled_gradient

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def read_entries(weight: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """weight[r, idx[r, j]]. weight [out, in], idx [out, k] int64 -> [out, k]."""
    return weight.detach().gather(1, idx)


def write_entries(weight: torch.Tensor, idx: torch.Tensor, values: torch.Tensor) -> None:
    """weight[r, idx[r, j]] = values[r, j], in place and unseen by autograd; values [out, k] in the weight's dtype."""
    # The same bits as integers: on CPU a scatter of bf16 takes two hundred times as long (torch 2.13).
    bits = BITS[weight.element_size()]
    weight.data.view(bits).scatter_(1, idx, values.contiguous().view(bits))


def adapted(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """base + delta, rounded once, to the base's dtype; delta is fp32 or wider."""
    return (base + delta.detach()).to(base.dtype)


@contextmanager
def bypass(weight: torch.Tensor, idx_bytes: torch.Tensor, delta: torch.Tensor) -> Iterator[None]:
    """While the block runs, the weight's selected entries hold `adapted` values; then the same bits as before.

    weight [out, in]; idx_bytes [out, 2k] uint8; delta [out, k].
    """
    idx = unpack_indices(idx_bytes)
    base = read_entries(weight, idx)
    try:
        write_entries(weight, idx, adapted(base, delta))
        yield
    finally:  # whatever happens: a second delta on top of a first would be a silent mistake
        write_entries(weight, idx, base)


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
        delta: torch.Tensor,
    ) -> torch.Tensor:
        ctx.keeps_entries = keeps_entries(weight, delta)
        kept = x.index_select(-1, unpack_indices(idx_bytes).flatten()) if ctx.keeps_entries else x
        # The Parameters themselves, never views: ZeRO-3 and FSDP2 swap their data and gather it again for backward.
        ctx.save_for_backward(kept, weight, idx_bytes, delta)
        with bypass(weight, idx_bytes, delta):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        kept, weight, idx_bytes, delta = ctx.saved_tensors
        dx = dbias = ddelta = None
        if ctx.needs_input_grad[0]:
            with bypass(weight, idx_bytes, delta):
                dx = dy @ weight
        if ctx.needs_input_grad[2]:
            dbias = dy.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[4]:
            if ctx.keeps_entries:
                columns = torch.arange(delta.numel(), device=dy.device).view(delta.shape)
            else:
                columns = unpack_indices(idx_bytes)
            ddelta = sampled_gradient(dy, kept, columns).to(delta.dtype)
        return dx, None, dbias, None, ddelta


def in_weight_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    idx_bytes: torch.Tensor,
    delta: torch.Tensor,
) -> torch.Tensor:
    """y = x @ W'.T + bias, where W' is `weight` with delta added at the selected entries.

    x [..., in] -> [..., out]; the rest as in `bypass`. Gradients reach x, bias and delta; `weight` is frozen, and is
    left as it was found.
    """
    return _InWeightLinear.apply(x, weight, bias, idx_bytes, delta)
