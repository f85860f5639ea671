"""The in-weight bypass: a Linear whose selected connections hold base + delta, without ever writing into the weight.

A bypass on selected connections equals a change of those entries of W, so the product is made with W', a private copy
of this one weight with the entries changed: made for a pass, freed with it, made again in backward. Other threads,
other adapters and an interrupted pass see the base's weight alone. The copy costs a few hundredths of the product; a
few tokens, whose product costs no more than reading W, go through `adapted_product` without one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from neuroada.ops.adapted_product import FEW_TOKENS, adapted, adapted_product
from neuroada.ops.indices import unpack_indices
from neuroada.ops.repeated import sum_repeated
from neuroada.ops.sampled_gradient import sampled_gradient
from neuroada.ops.weight_format import PLAIN, WeightFormat

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def read_entries(weight: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """weight[r, idx[r, j]]. weight [out, in], idx [out, k] int64 -> [out, k]."""
    return weight.detach().gather(1, idx)


def write_entries(weight: torch.Tensor, idx: torch.Tensor, values: torch.Tensor) -> None:
    """weight[r, idx[r, j]] = values[r, j], in place and unseen by autograd; values [out, k] in the weight's dtype."""
    # The same bits as integers: on CPU a scatter of bf16 takes two hundred times as long (torch 2.13).
    bits = BITS[weight.element_size()]
    weight.data.view(bits).scatter_(1, idx, values.contiguous().view(bits))


def adapted_weight(
    stored: torch.Tensor, idx_bytes: torch.Tensor, delta: torch.Tensor, weight_format: WeightFormat = PLAIN
) -> torch.Tensor:
    """W' [out, in], private: the stored weight with `adapted` values at its selected entries.

    idx_bytes [out, 2k] uint8; delta [out, k].
    """
    scratch, idx = weight_format.scratch(stored), unpack_indices(idx_bytes)
    write_entries(scratch, idx, adapted(read_entries(scratch, idx), delta))
    return scratch


def keeps_entries(in_features: int, delta: torch.Tensor) -> bool:
    """Whether backward keeps of x only its columns at the selected entries, [..., out * k], instead of all.

    So where they are at most half as many: a Llama's down_proj at k = 1, whose input is the widest of its block and
    which nothing else keeps. (Counting repeated columns once would save more, and cost a GPU a wait for the count.)
    """
    return 2 * delta.numel() <= in_features


def _product(
    x: torch.Tensor,
    stored: torch.Tensor,
    bias: torch.Tensor | None,
    idx_bytes: torch.Tensor,
    delta: torch.Tensor,
    weight_format: WeightFormat,
    repeated: bool,
) -> torch.Tensor:
    # A few tokens' product adds what each entry changes: of a column that is named twice it would add all of it twice.
    if not repeated and x.numel() <= FEW_TOKENS * x.shape[-1] and (matrix := weight_format.matrix(stored)) is not None:
        return adapted_product(x, matrix, bias, idx_bytes, delta)
    return F.linear(x, adapted_weight(stored, idx_bytes, delta, weight_format).to(x.dtype), bias)


class _InWeightLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stored: torch.Tensor,
        bias: torch.Tensor | None,
        idx_bytes: torch.Tensor,
        delta: torch.Tensor,
        summed: torch.Tensor | None,  # delta where it is added, of rows that name a column more than once
        weight_format: WeightFormat,
    ) -> torch.Tensor:
        change = delta if summed is None else summed
        ctx.weight_format, ctx.keeps_entries = weight_format, keeps_entries(x.shape[-1], delta)
        kept = x.index_select(-1, unpack_indices(idx_bytes).flatten()) if ctx.keeps_entries else x
        # The Parameters themselves, never views: ZeRO-3 and FSDP2 swap their data and gather it again for backward, and
        # autograd refuses a backward over values that were changed (merged, say) since.
        ctx.save_for_backward(kept, stored, idx_bytes, change)
        return _product(x, stored, bias, idx_bytes, change, weight_format, summed is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        kept, stored, idx_bytes, change = ctx.saved_tensors
        dx = dbias = ddelta = None
        leading = dy.shape[:-1]
        # Of three dimensions with the strides of attention's gradients, torch would multiply sequence by sequence, on a
        # CPU with a copy of the weight for each.
        dy = dy.reshape(leading.numel(), dy.shape[-1])
        with torch.autocast(dy.device.type, enabled=False):  # forward has cast what was to be cast
            if ctx.needs_input_grad[0]:
                dx = dy @ adapted_weight(stored, idx_bytes, change, ctx.weight_format).to(dy.dtype)
                dx = dx.view(*leading, dx.shape[-1])
            if ctx.needs_input_grad[2]:
                dbias = dy.sum(0)
            if ctx.needs_input_grad[4]:
                if ctx.keeps_entries:
                    columns = torch.arange(change.numel(), device=dy.device).view(change.shape)
                else:
                    columns = unpack_indices(idx_bytes)
                ddelta = sampled_gradient(dy, kept, columns).to(change.dtype)
        return dx, None, dbias, None, ddelta, None, None


def in_weight_linear(
    x: torch.Tensor,
    stored: torch.Tensor,
    bias: torch.Tensor | None,
    idx_bytes: torch.Tensor,
    delta: torch.Tensor,
    weight_format: WeightFormat = PLAIN,
    *,
    repeated: bool = False,
) -> torch.Tensor:
    """y = x @ W'.T + bias, where W' is the weight with delta added at the selected entries.

    x [..., in] -> [..., out]; idx_bytes [out, 2k] uint8; delta [out, k] fp32 or wider; `stored`: see `weight_format`.
    Gradients reach x, bias and delta, once: a second derivative is refused. The weight is frozen, and never written.
    Under autocast the product is made in its dtype, from W' rounded once to the stored dtype and then cast.
    `repeated`: a row may name a column more than once (several adapters, side by side); its deltas add up.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # as autocast itself
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    summed = sum_repeated(unpack_indices(idx_bytes), delta.detach()) if repeated else None
    wanted = (x, delta) if bias is None else (x, delta, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted):
        return _InWeightLinear.apply(x, stored, bias, idx_bytes, delta, summed, weight_format)
    return _product(x, stored, bias, idx_bytes, delta if summed is None else summed, weight_format, repeated)
