"""The sampled gradient: the entries of a Linear's weight gradient at k chosen columns of each row, and no others.

    grad[r, j] = sum over t of dy[t, r] * x[t, idx[r, j]]

`reference` is the definition. The others compute the same by other means; `sampled_gradient` picks among them: on CPU
the compiled kernel, on a GPU the faster of two, timed once. docs/kernels.md has the measurements behind the choice.

Shapes everywhere: dy [tokens, out] and x [tokens, in] (`sampled_gradient` and `reference`: any leading dimensions),
idx [out, k] int64 in [0, in) -> [out, k], in fp32 for inputs of fp32 or less, float64 for float64.
"""

import time
from collections.abc import Callable

import torch

from neuroada.ops import cpu_kernel

Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _grad_dtype(dy: torch.Tensor, x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(dy.dtype, x.dtype), torch.float32)


def _matrix(values: torch.Tensor) -> torch.Tensor:
    """[..., features] -> [tokens, features], without a copy where the strides allow it."""
    return values.reshape(values.shape[:-1].numel(), values.shape[-1])


def reference(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """The definition, in plain torch."""
    accumulate = _grad_dtype(dy, x)
    dyt, xt = _matrix(dy).t().to(accumulate), _matrix(x).t().to(accumulate)
    return torch.stack([(dyt * xt[idx[:, j]]).sum(1) for j in range(idx.shape[1])], 1)


def embedding_bag(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """By `embedding_bag`'s per-sample-weight gradient, over chunks of tokens small enough for the cache.

    The fallback on a CPU without a compiler. The backward's own operator is called, since autograd is off inside one.
    """
    accumulate = _grad_dtype(dy, x)
    rows, k = idx.shape
    offsets = torch.arange(0, rows * k, k, device=idx.device)
    bag_of_entry = torch.arange(rows, device=idx.device).repeat_interleave(k)
    grad = torch.zeros(rows * k, dtype=accumulate, device=x.device)
    for start in range(0, len(x), chunk):
        xt = x[start : start + chunk].to(accumulate).t().contiguous()
        dyt = dy[start : start + chunk].to(accumulate).t().contiguous()
        grad += torch.ops.aten._embedding_bag_per_sample_weights_backward(
            dyt, xt, idx.flatten(), offsets, bag_of_entry, mode=0
        )
    return grad.view(rows, k)


def dense(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """The whole dW of this one layer, k entries a row kept: the tensor cores' way, for out x in x 4 bytes of memory."""
    accumulate = _grad_dtype(dy, x)
    if x.is_cuda and dy.dtype == x.dtype and x.dtype in (torch.bfloat16, torch.float16):
        weight_grad = torch.mm(dy.t(), x, out_dtype=accumulate)  # else cuBLAS rounds its fp32 sums to 16 bits
    else:
        weight_grad = dy.t().to(accumulate) @ x.to(accumulate)
    return weight_grad.gather(1, idx)


def fastest(candidates: list[Backend], dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> Backend:
    """The candidate whose best of three calls is shortest on these inputs, after one call each to compile."""

    def seconds(backend: Backend) -> float:
        start = time.perf_counter()
        backend(dy, x, idx)
        if not x.is_cpu:
            torch.accelerator.synchronize(x.device)
        return time.perf_counter() - start

    return min(candidates, key=lambda backend: min([seconds(backend) for _ in range(4)][1:]))


_chosen: dict[tuple, Backend] = {}
_pinned: list[Backend] = []  # at most one


def gpu_backends() -> dict[str, Backend]:
    """What a GPU may compute by: `dense`, and the Triton kernel where torch comes with Triton."""
    try:
        from neuroada.ops.triton_kernel import triton_dot_products
    except ImportError:
        return {"dense": dense}
    return {"triton": triton_dot_products, "dense": dense}


def pin_gpu_backend(name: str | None) -> None:
    """Compute by this one of `gpu_backends` from now on; None: by the fastest again.

    Two backends differ in their last bits, and ranks that time them alone may disagree.
    """
    _pinned[:] = [] if name is None else [gpu_backends()[name]]


def _on_gpu(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """By the pinned backend, or the fastest, timed at the first call of this device, dtype and shape class.

    Token counts of one power of two are one class: packed batches differ a little from step to step.
    """
    if _pinned:
        return _pinned[0](dy, x, idx)
    key = (x.device, x.dtype, dy.dtype, x.shape[1], *idx.shape, len(x).bit_length())
    if key not in _chosen:
        _chosen[key] = fastest(list(gpu_backends().values()), dy, x, idx)
    return _chosen[key](dy, x, idx)


@torch.library.custom_op("neuroada::sampled_gradient", mutates_args=())
def sampled_gradient(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """dy [..., out], x [..., in], idx [out, k] int64 -> [out, k] in fp32 (float64 for float64), by the fastest backend.

    Any strides and any number of tokens. IndexError on CPU when idx points outside of x. An operator of torch's, so
    that torch.compile and FakeTensorMode see one node of known shape.
    """
    dy, x = _matrix(dy), _matrix(x)
    if len(x) == 0 or idx.numel() == 0:
        return torch.zeros(idx.shape, dtype=_grad_dtype(dy, x), device=x.device)
    if not x.is_cpu:
        return _on_gpu(dy, x, idx)
    library = cpu_kernel.load()
    return embedding_bag(dy, x, idx) if library is None else cpu_kernel.compiled(dy, x, idx, library)


@sampled_gradient.register_fake
def _(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return torch.empty(idx.shape, dtype=_grad_dtype(dy, x), device=x.device)
