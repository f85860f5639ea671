"""The Triton kernel: the sampled gradient on a GPU. Its equality is tested on CPU under Triton's interpreter.

The plan is sampled_gradient.cpp's: transpose x and dy, so that the tokens of a column are contiguous, and every entry
is a dot product of two rows. A program owns a block of rows x entries and walks over the tokens alone: no atomics, the
same bits on every run.
"""

import torch
import triton
import triton.language as tl

TOKENS = 128  # tokens a program multiplies at once
ENTRIES = 16  # entries of grad a program owns: rows x connections, 4 x 4 or 16 x 1


@triton.jit
def _dot_products(
    dyt, xt, idx, grad, tokens, out, k, ROWS: tl.constexpr, CONNECTIONS: tl.constexpr, TOKENS: tl.constexpr
):
    """dyt [out, tokens], xt [in, tokens], idx and grad [out, k], all contiguous; tokens a multiple of TOKENS."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    connection = tl.program_id(1) * CONNECTIONS + tl.arange(0, CONNECTIONS)
    entry = row[:, None] * k + connection[None, :]
    exists = (row < out)[:, None] & (connection < k)[None, :]
    column = tl.load(idx + entry, mask=exists, other=0)
    total = tl.zeros((ROWS, CONNECTIONS, TOKENS), grad.dtype.element_ty)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        d = tl.load(dyt + row[:, None] * tokens + token[None, :], mask=(row < out)[:, None], other=0.0)
        v = tl.load(xt + column[:, :, None] * tokens + token[None, None, :])
        total += d[:, None, :].to(total.dtype) * v.to(total.dtype)
    tl.store(grad + entry, tl.sum(total, 2), mask=exists)


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """[tokens, columns] -> [columns, tokens], contiguous, with zeros up to a multiple of TOKENS."""
    tokens, columns = matrix.shape
    transposed = matrix.new_empty(columns, -(-tokens // TOKENS) * TOKENS)
    transposed[:, :tokens] = matrix.t()
    transposed[:, tokens:] = 0
    return transposed


def triton_dot_products(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """dy [tokens, out], x [tokens, in] in bf16, fp16, fp32 or float64, idx [out, k] int64 -> [out, k] fp32 or float64.

    idx is trusted to lie in [0, in), as by every indexing kernel on a GPU.
    """
    dyt, xt = _transposed(dy), _transposed(x)
    out, k = idx.shape
    accumulate = torch.promote_types(torch.promote_types(dy.dtype, x.dtype), torch.float32)
    grad = torch.empty(out, k, dtype=accumulate, device=x.device)
    connections = min(4, triton.next_power_of_2(k))
    rows = ENTRIES // connections
    grid = (triton.cdiv(out, rows), triton.cdiv(k, connections))
    with torch.cuda.device_of(x):  # Triton launches on the current GPU: a model may be laid out over several
        _dot_products[grid](
            dyt, xt, idx.contiguous(), grad, xt.shape[1], out, k, ROWS=rows, CONNECTIONS=connections, TOKENS=TOKENS
        )
    return grad
