"""The candidates for the sampled gradient, and the bypass, side by side; a roofline at the LLaMA models' shapes.

    python benchmarks/sampled_gradient.py                       # this machine's CPU
    python benchmarks/sampled_gradient.py --device cuda --shapes 4096x4096 11008x4096 --dtypes bf16 --tokens 2048
    python benchmarks/sampled_gradient.py --roofline            # bytes and operations, nothing is run

Every repetition runs all candidates once, so that a disturbance hits all of them; the table gives the median, the best,
and the median of the ratios to the one GEMM `dy @ W` of the same repetition. One thread is timed by the processor time
it used, which other work on the machine disturbs little; several threads and a GPU by the clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from neuroada.ops import pack_indices, sampled_gradient
from neuroada.ops.linear import adapted_weight
from neuroada.ops.sampled_gradient import dense, embedding_bag, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

# (out, in) -> layers of that shape in one block. LLaMA's projections: q k v o, gate up, down.
MODELS = {
    "LLaMA-7B": {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1},
    "LLaMA-13B": {(5120, 5120): 4, (13824, 5120): 2, (5120, 13824): 1},
}


def column_gather(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """One gather of x's columns, as they lie, for each of the k connections."""
    return torch.stack([(dy * x[:, column]).sum(0, dtype=torch.float32) for column in idx.t()], 1)


def gather_multiply_reduce(dy: torch.Tensor, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """For torch.compile to fuse: no [tokens, out, k] tensor is to be formed."""
    dyt, xt = dy.t().contiguous().float(), x.t().contiguous().float()
    return (dyt[:, None, :] * xt[idx]).sum(2)


def roofline() -> None:
    """Bytes and operations a layer: the GEMM dy @ W, and the sampled gradient by the transposing kernels.

    Moved at least: dy and x read, their transposes written and read again, idx (8 bytes) and grad (4 bytes) once. From
    the cache: one 2-byte element of x an operation pair, what the kernel lives on. Everything else bf16.
    """
    tokens = 2048
    print(f"{tokens} tokens, bf16; GFLOP = 1e9 multiplications and additions, MB = 1e6 bytes")
    print("| model | out x in | k | GEMM GFLOP | GEMM MB | GFLOP | MB | cache MB | FLOP / FLOP of GEMM |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for model, shapes in MODELS.items():
        for out, columns in shapes:
            gemm, gemm_bytes = 2 * tokens * out * columns, 2 * (tokens * (out + columns) + out * columns)
            for k in (1, 20):
                work, moved = 2 * tokens * out * k, 3 * 2 * tokens * (out + columns) + (8 + 4) * out * k
                numbers = [f"{gemm / 1e9:.0f}", f"{gemm_bytes / 1e6:.0f}", f"{work / 1e9:.3f}", f"{moved / 1e6:.0f}"]
                row = [model, f"{out} x {columns}", str(k), *numbers, f"{work / 1e6:.0f}", f"{work / gemm:.2%}"]
                print("|", " | ".join(row), "|")


def candidates(device: str, k: int) -> dict[str, Callable]:
    table: dict[str, Callable] = {"sampled_gradient (chosen)": sampled_gradient, "dense then gather": dense}
    if device == "cuda":
        from neuroada.ops.triton_kernel import triton_dot_products

        return {**table, "Triton": triton_dot_products}
    table["embedding_bag"] = embedding_bag
    table["torch.compile'd gather-multiply-reduce"] = torch.compile(gather_multiply_reduce, dynamic=False)
    return {**table, "column gather": column_gather} if k == 1 else {**table, "reference": reference}


def measure(tokens: int, out: int, columns: int, dtype: torch.dtype, k: int, device: str, repetitions: int) -> None:
    dy, x = (torch.randn(tokens, features, device=device).to(dtype) for features in (out, columns))
    torch.compiler.reset()  # one shape, one compilation: no recompile limit, no dynamic shapes
    weight = torch.randn(out, columns, device=device).to(dtype)
    idx = torch.rand(out, columns, device=device).topk(k, 1).indices
    expected = reference(dy.double(), x.double(), idx)
    idx_bytes, delta = pack_indices(idx), torch.randn(out, k, device=device)

    def private_copy(*_: torch.Tensor) -> torch.Tensor:
        return adapted_weight(weight, idx_bytes, delta)

    apart = {"GEMM dy @ W": lambda *_: dy @ weight, "private copy with the entries": private_copy}
    functions = {**apart, **candidates(device, k)}
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 2):  # two to compile and to warm the caches
        for name, function in functions.items():
            synchronize()
            start = clock()
            function(dy, x, idx)
            synchronize()
            if repetition >= 2:
                seconds[name].append(clock() - start)
    gemm = seconds["GEMM dy @ W"]
    for name, times in seconds.items():
        ratio = statistics.median(t / g for t, g in zip(times, gemm, strict=True))
        error = "" if name in apart else f"{(functions[name](dy, x, idx) - expected).norm() / expected.norm():.0e}"
        label = f"{tokens} | {out} x {columns} | {str(dtype).removeprefix('torch.')} | {k}"
        print(
            f"| {label} | {name} | {statistics.median(times) * 1e3:.2f} | {min(times) * 1e3:.2f} | {ratio:.3f} "
            f"| {min(times) / min(gemm):.2f} | {error} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "2816x1024", "1024x2816"], help="out x in")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--roofline", action="store_true", help="print the bytes and operations instead")
    arguments = parser.parse_args()
    if arguments.roofline:
        return roofline()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads, milliseconds")
    print("| tokens | out x in | dtype | k | candidate | median | best | median / GEMM | best / GEMM | error |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for shape in arguments.shapes:
        out, columns = map(int, shape.split("x"))
        for dtype in arguments.dtypes:
            for k in arguments.k:
                measure(arguments.tokens, out, columns, DTYPES[dtype], k, arguments.device, arguments.repetitions)
    return None


if __name__ == "__main__":
    main()
