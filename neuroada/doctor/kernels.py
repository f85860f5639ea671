"""The sparse operator's kernels equal the definition, in float64 and in plain torch."""

import torch

from neuroada.doctor.check import Check, Found, Place, relative
from neuroada.ops import FEW_TOKENS, cpu_kernel, in_weight_linear, pack_indices
from neuroada.ops.sampled_gradient import (
    Backend,
    dense,
    embedding_bag,
    fastest,
    gpu_backends,
    reference,
    sampled_gradient,
)

TOKENS, OUT, IN, K = 300, 344, 128, 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def backends(device: torch.device) -> dict[str, Backend]:
    """Every way to compute the sampled gradient on this device, by name; "chosen" is what a training uses."""
    if device.type != "cpu":
        return {**gpu_backends(), "chosen": sampled_gradient}
    found: dict[str, Backend] = {"embedding_bag": embedding_bag, "dense": dense, "chosen": sampled_gradient}
    if (library := cpu_kernel.load()) is not None:
        found["compiled"] = lambda dy, x, idx: cpu_kernel.compiled(dy, x, idx, library)
    return found


class SampledGradient(Check):
    name = "kernel-gradient"
    claim = "every kernel of the sampled gradient gives what its definition gives in float64, from fp32 and from bf16"
    number = "largest relative error"

    def run(self, place: Place) -> Found:
        generator = torch.Generator().manual_seed(0)
        dy, x = torch.randn(TOKENS, OUT, generator=generator), torch.randn(TOKENS, IN, generator=generator)
        idx = torch.rand(OUT, IN, generator=generator).argsort(1)[:, :K].to(place.device)
        errors = {}
        for name, dtype in DTYPES.items():
            dy, x = (values.to(place.device, dtype) for values in (dy, x))
            expected = reference(dy.double(), x.double(), idx)
            for backend, compute in backends(place.device).items():
                errors[f"{backend} {name}"] = relative(compute(dy, x, idx), expected)
        named = backends(place.device)
        del named["chosen"]
        best = fastest(list(named.values()), dy, x, idx)
        quickest = next(backend for backend, compute in named.items() if compute is best)
        return Found(max(errors.values()), 1e-5, f"{', '.join(named)}; {quickest} is the fastest in bf16", errors)


class Product(Check):
    name = "kernel-product"
    claim = "the layer's output and gradients are those of the dense product with W + delta, for many tokens and few"
    number = "largest relative error in fp32"

    def run(self, place: Place) -> Found:
        errors = {}
        for tokens in (FEW_TOKENS, TOKENS):
            for name, error in self._errors(tokens, place.device).items():
                errors[f"{name}, {tokens} tokens"] = error
        return Found(max(errors.values()), 1e-5, "output, gradient of the input, gradient of delta", errors)

    def _errors(self, tokens: int, device: torch.device) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        weight, x, dy, delta = (
            torch.randn(shape, generator=generator).to(device)
            for shape in ((OUT, IN), (tokens, IN), (tokens, OUT), (OUT, K))
        )
        idx = torch.rand(OUT, IN, generator=generator).argsort(1)[:, :K].to(device)
        x.requires_grad_(True)
        delta.requires_grad_(True)
        y = in_weight_linear(x, weight, None, pack_indices(idx), delta)
        found = y, *torch.autograd.grad(y, (x, delta), dy)
        wide_x, wide_delta = (values.detach().double().requires_grad_(True) for values in (x, delta))
        expected_y = wide_x @ weight.double().scatter_add(1, idx, wide_delta).t()
        expected = expected_y, *torch.autograd.grad(expected_y, (wide_x, wide_delta), dy.double())
        names = ("output", "dx", "ddelta")
        return {name: relative(*pair) for name, *pair in zip(names, found, expected, strict=True)}
