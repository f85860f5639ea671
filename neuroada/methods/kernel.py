"""Which kernel computes the sampled gradient on GPUs: one choice for all ranks, so that their last bits agree."""

import torch
import torch.distributed as dist

from neuroada import sharding
from neuroada.adapter import NeuroAdaLinear
from neuroada.ops.sampled_gradient import fastest, gpu_backends, pin_gpu_backend


def pin_kernel(wanted: str, layers: list[NeuroAdaLinear], tokens: int, dtype: torch.dtype, device: torch.device) -> str:
    """Pin `wanted` (auto | triton | dense) on this device's kind; returns what was pinned. Collective.

    auto: the one that is faster on the largest layer with `tokens` tokens, timed by rank 0. On a CPU there is nothing
    to choose.
    """
    if device.type != "cuda":
        return "cpu"
    chosen = [wanted]
    if wanted == "auto":
        if not dist.is_initialized() or dist.get_rank() == 0:
            chosen = [_time(layers, tokens, dtype, device)]
        if dist.is_initialized():
            dist.broadcast_object_list(chosen)
    pin_gpu_backend(chosen[0])
    return chosen[0]


def _time(layers: list[NeuroAdaLinear], tokens: int, dtype: torch.dtype, device: torch.device) -> str:
    """The fastest on random values of the largest layer's shape."""
    largest = max(layers, key=lambda layer: layer.in_features * layer.out_features)
    k = sharding.shape(largest.neuroada_delta["default"])[1]
    dy = torch.randn(tokens, largest.out_features, device=device, dtype=dtype)
    x = torch.randn(tokens, largest.in_features, device=device, dtype=dtype)
    idx = torch.randint(largest.in_features, (largest.out_features, k), device=device)
    backends = gpu_backends()
    best = fastest(list(backends.values()), dy, x, idx)
    return next(name for name, backend in backends.items() if backend is best)
