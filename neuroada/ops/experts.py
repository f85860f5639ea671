"""The products of a mixture's experts, each with its own tokens and its own weight, of a weight [experts, ., .].

As `in_weight_linear`, expert by expert: W' of one expert at a time is private memory, and the gradient is sampled at
that expert's connections from its own tokens. No dense gradient is made, and an expert without tokens costs nothing.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from neuroada.ops.indices import unpack_indices
from neuroada.ops.linear import adapted_weight
from neuroada.ops.sampled_gradient import sampled_gradient
from neuroada.ops.weight_format import WeightFormat


def tokens_of_experts(chosen: torch.Tensor, experts: int) -> list[int]:
    """How many of `chosen` [tokens] name each expert. Of fake tensors, which have no values: as many each."""
    if isinstance(chosen, FakeTensor):
        each, rest = divmod(len(chosen), experts)
        return [each + (expert < rest) for expert in range(experts)]
    return torch.bincount(chosen, minlength=experts).tolist()


def _spans(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its tokens) of the experts that have any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


class _ExpertsLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        stored: torch.Tensor,
        counts: list[int],
        idx_bytes: torch.Tensor | None,
        delta: torch.Tensor | None,
        weight_format: WeightFormat,
        out_features: int,
    ) -> torch.Tensor:
        ctx.counts, ctx.weight_format = counts, weight_format
        # The Parameters themselves, never an expert's view: engines swap their data and gather it again for backward.
        ctx.save_for_backward(x, stored, idx_bytes, delta)
        y = x.new_zeros(len(x), out_features)
        for expert, tokens in _spans(counts):
            y[tokens] = F.linear(x[tokens], _weight(stored, idx_bytes, delta, weight_format, expert).to(x.dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, stored, idx_bytes, delta = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        ddelta = torch.zeros_like(delta) if ctx.needs_input_grad[4] else None
        with torch.autocast(dy.device.type, enabled=False):
            for expert, tokens in _spans(ctx.counts):
                if dx is not None:
                    weight = _weight(stored, idx_bytes, delta, ctx.weight_format, expert)
                    dx[tokens] = dy[tokens] @ weight.to(dy.dtype)
                if ddelta is not None:
                    columns = unpack_indices(idx_bytes[expert])
                    ddelta[expert] = sampled_gradient(dy[tokens], x[tokens], columns).to(ddelta.dtype)
        return dx, None, None, None, ddelta, None, None


def _weight(
    stored: torch.Tensor,
    idx_bytes: torch.Tensor | None,
    delta: torch.Tensor | None,
    weight_format: WeightFormat,
    expert: int,
) -> torch.Tensor:
    """W' of one expert, [out, in]; without connections its W."""
    if idx_bytes is not None and delta is not None:
        return adapted_weight(stored[expert], idx_bytes[expert], delta[expert], weight_format)
    matrix = weight_format.matrix(stored[expert])
    return weight_format.scratch(stored[expert]) if matrix is None else matrix.detach()


def experts_linear(
    x: torch.Tensor,
    counts: list[int],
    stored: torch.Tensor,
    idx_bytes: torch.Tensor | None,
    delta: torch.Tensor | None,
    weight_format: WeightFormat,
    out_features: int,
) -> torch.Tensor:
    """y[t] = W'[expert of t] @ x[t]; tokens lie in the order of their experts, and beyond the last one's y is 0.

    x [tokens, in] -> [tokens, out]; counts: tokens of each expert; stored: one weight of `weight_format` for each
    expert; idx_bytes [experts, out, 2k] uint8 and delta [experts, out, k] fp32 or wider, or None: the base's product.
    Gradients reach x and delta, once; the weights are frozen, and never written.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: torch.Tensor = _ExpertsLinear.apply(x, stored, counts, idx_bytes, delta, weight_format, out_features)
    return y
