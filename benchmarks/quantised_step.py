"""Forward and backward of one adapted quantised layer, over plain dequantise-and-multiply of the same bytes.

    python benchmarks/quantised_step.py                       # nf4, 2048 x 2048, 512 tokens, k = 20, fp32, one thread
    python benchmarks/quantised_step.py --format int8 --dtype bf16 --device cuda --size 4096

plain: the weight is dequantised in forward and again in backward, without exact entries and with nothing to train; dx
is computed. adapted: base.exact = k, as a recipe has it, with k deltas a row and their gradient. The two take turns, in
another order each time, so that a disturbance hits both; the ratio is taken within a pair. Processor time on a CPU,
where other work stretches the clock and hardly that; the clock on a GPU. Prints the median ratio and its quartiles.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from neuroada import NeuroAdaConfig
from neuroada.adapter import NeuroAdaLinear
from neuroada.quantised import FORMATS, PackedRows, Quantisation, QuantisedLinear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Plain(torch.autograd.Function):
    """y = x @ dequantised.T; the dense weight is dropped after each product."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.rows = rows
        return x @ rows.decode(packed, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return grads[0] @ ctx.rows.decode(packed, grads[0].dtype), None, None


def seconds(step: Callable[[], None], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def steps(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    dense = nn.Linear(args.size, args.size, bias=False, device=args.device, dtype=dtype)
    plain = QuantisedLinear.of(dense, Quantisation(args.format))
    layer = NeuroAdaLinear(QuantisedLinear.of(dense, Quantisation(args.format, args.k)), "layer")
    layer.add_adapter("default", NeuroAdaConfig(k=args.k))
    x = torch.randn(args.tokens, args.size, device=args.device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def adapted() -> None:
        layer(x).backward(dy)
        x.grad = layer.neuroada_delta["default"].grad = None

    def reference() -> None:
        Plain.apply(x, plain.packed, plain.rows).backward(dy)
        x.grad = None

    return {"adapted": adapted, "plain": reference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="nf4")
    parser.add_argument("--size", type=int, default=2048, help="inputs and outputs")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(1)
    both, found = steps(args), []
    for step in both.values():
        step()
    for _ in range(args.repetitions):
        order = random.sample(list(both), 2)
        took = {name: seconds(both[name], args.device) for name in order}
        found.append(took)
    ratios = statistics.quantiles([took["adapted"] / took["plain"] for took in found], n=4)
    medians = {name: round(statistics.median(took[name] for took in found), 4) for name in both}
    print(
        json.dumps({**vars(args), "seconds": medians, "ratio": dict(zip(("q1", "median", "q3"), ratios, strict=True))})
    )


if __name__ == "__main__":
    main()
