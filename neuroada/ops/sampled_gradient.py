"""The sampled gradient: the entries of a Linear's weight gradient at k chosen columns of each row, and no others.

    grad[r, j] = sum over t of dy[t, r] * x[t, idx[r, j]]
"""

import torch
import torch.nn.functional as F


def reference(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """The definition, in plain torch. dy [..., out], x [..., in], idx [out, k] int64 -> [out, k].

    fp32 for inputs of fp32 or less, float64 for float64.
    """
    accumulate = torch.promote_types(dy.dtype, torch.float32)
    dyt = dy.flatten(0, -2).t().to(accumulate)
    xt = x.flatten(0, -2).t().to(accumulate)
    return torch.stack([(dyt * xt[idx[:, j]]).sum(1) for j in range(idx.shape[1])], 1)


def embedding_bag(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor, tokens: int = 256) -> torch.Tensor:
    """The same by `embedding_bag`'s per-sample-weight gradient, over chunks of tokens small enough for the cache."""
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    accumulate = torch.promote_types(dy.dtype, torch.float32)
    rows, k = idx.shape
    flat = idx.reshape(-1)
    offsets = torch.arange(0, rows * k, k, device=idx.device)
    grad = torch.zeros(rows, k, dtype=accumulate, device=x.device)
    for start in range(0, len(x), tokens):
        xt = x[start : start + tokens].to(accumulate).t().contiguous()
        dyt = dy[start : start + tokens].to(accumulate).t().contiguous()
        weights = torch.ones(rows * k, dtype=accumulate, device=x.device, requires_grad=True)
        with torch.enable_grad():
            bags = F.embedding_bag(flat, xt, offsets, mode="sum", per_sample_weights=weights)
        (part,) = torch.autograd.grad(bags, weights, dyt)
        grad += part.view(rows, k)
    return grad


def sampled_gradient(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """dy [..., out], x [..., in], idx [out, k] int64 -> [out, k] in fp32 (float64 for float64), by the fastest backend."""
    return embedding_bag(dy, x, idx)
