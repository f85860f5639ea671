"""The product of a few tokens with the adapted weight, whose time is that of reading the weight once: decoding.

On CPU a compiled kernel changes each row's entries in the L1 cache on the way. Elsewhere the base's product is made
and the difference at the connections added.
"""

import torch
import torch.nn.functional as F

from neuroada.ops import cpu_kernel
from neuroada.ops.indices import unpack_indices

FEW_TOKENS = 16
"""With more, a scratch copy of the weight costs less (docs/speed.md)."""


def adapted(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """base + delta, rounded once, to the base's dtype. (A sum of two bf16 tensors is made in fp32 and rounded once.)"""
    return (base + delta.detach()).to(base.dtype)


def side_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, idx_bytes: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """As `adapted_product`, in plain torch on any device: x @ W.T + x @ (W' - W).T, the latter at the entries alone."""
    idx = unpack_indices(idx_bytes)
    weight, delta = weight.detach(), delta.detach()
    base = weight.gather(1, idx)
    change = adapted(base, delta).to(torch.promote_types(delta.dtype, torch.float32)) - base
    entries = x.index_select(-1, idx.flatten()).unflatten(-1, idx.shape)
    return F.linear(x, weight.to(x.dtype), bias) + (entries * change).sum(-1).to(x.dtype)


def _compiled(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, idx_bytes: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    fits = x.dtype == weight.dtype and x.dtype in cpu_kernel.ACCUMULATE and x.is_cpu and weight.stride(1) == 1
    library = cpu_kernel.load() if fits and x.numel() and delta.numel() else None
    if library is None:
        return side_product(x, weight, bias, idx_bytes, delta)
    return cpu_kernel.adapted_product(x, weight, bias, idx_bytes, delta, library)


_operator = torch.library.custom_op("neuroada::adapted_product", _compiled, mutates_args=())


@_operator.register_fake
def _(x, weight, bias, idx_bytes, delta):
    return x.new_empty(*x.shape[:-1], len(weight))


def adapted_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, idx_bytes: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """x @ W'.T + bias, where W' is `weight` with base + delta, rounded once, at the entries. No gradients.

    x [..., in] and weight [out, in] of one dtype, idx_bytes [out, 2k] uint8, delta [out, k] -> [..., out].
    """
    plain = type(x) is torch.Tensor and type(weight) in (torch.Tensor, torch.nn.Parameter)
    if plain and not torch.compiler.is_compiling():
        if not torch.is_grad_enabled():
            return _compiled(x, weight, bias, idx_bytes, delta)
        with torch.no_grad():
            return _compiled(x, weight, bias, idx_bytes, delta)
    # An operator of torch's, so that torch.compile and FakeTensorMode see one node of known shape; its 20 us are too
    # much for each layer of each token.
    return _operator(x.detach(), weight.detach(), bias, idx_bytes.detach(), delta.detach())
