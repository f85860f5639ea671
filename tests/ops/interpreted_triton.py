"""The Triton kernel against the reference, under Triton's interpreter. Run by test_triton_kernel.py in a process of its
own: Triton reads TRITON_INTERPRET when it is imported."""

import torch

from neuroada.ops.sampled_gradient import reference
from neuroada.ops.triton_kernel import triton_dot_products

# The seven projections of LLaMA-7B, 13B and Llama-3-8B, each side divided by 256: 4096 -> 16, 11008 -> 43.
LLAMA = [(16, 16), (43, 16), (16, 43), (20, 20), (54, 20), (20, 54), (4, 16), (56, 16), (16, 56)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def check(tokens: int, out: int, columns: int, k: int, dtype: torch.dtype) -> None:
    dy, x = torch.randn(tokens, out).to(dtype), torch.randn(columns, tokens).to(dtype).t()
    idx = torch.stack([torch.randperm(columns)[:k] for _ in range(out)])
    expected = reference(dy.double(), x.double(), idx)
    found = triton_dot_products(dy, x, idx)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < TOLERANCE[dtype], (tokens, out, columns, k, dtype, error)


torch.manual_seed(0)
for shape in LLAMA:
    for k in (1, 4):
        check(130, *shape, k, torch.bfloat16)
for dtype in TOLERANCE:
    check(1, 5, 7, 7, dtype)
    check(257, 3, 65, 20, dtype)
print("equal")
