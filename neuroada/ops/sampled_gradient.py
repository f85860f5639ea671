"""The sampled gradient: the entries of a Linear's weight gradient at k chosen columns of each row, and no others.

    grad[r, j] = sum over t of dy[t, r] * x[t, idx[r, j]]

`reference` is the definition. The others compute the same by other means; `sampled_gradient` picks among them.
docs/kernels.md has the measurements behind the choice.
"""

import torch
import torch.nn.functional as F

from neuroada.ops import cpu_kernel


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


@torch.library.custom_op("neuroada::sampled_gradient", mutates_args=())
def sampled_gradient(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """dy [..., out], x [..., in], idx [out, k] int64 -> [out, k] in fp32 (float64 for float64), by the fastest backend.

    An operator of torch's, so that torch.compile and FakeTensorMode see one node of known shape.
    """
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    library = cpu_kernel.load()
    return embedding_bag(dy, x, idx) if library is None else cpu_kernel.compiled(dy, x, idx, library)


@sampled_gradient.register_fake
def _(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return idx.new_empty(idx.shape, dtype=torch.promote_types(torch.promote_types(dy.dtype, x.dtype), torch.float32))
