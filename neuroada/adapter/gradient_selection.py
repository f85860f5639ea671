"""selection = gradient: the connections whose loss gradient is largest on one batch, layer by layer in one backward."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from neuroada import sharding
from neuroada.adapter.layer import NeuroAdaLinear
from neuroada.adapter.model import NeuroAdaModel
from neuroada.adapter.selection import select_top_k
from neuroada.ops import pack_indices, unpack_indices


class _Scout(torch.autograd.Function):
    """A Linear that, on its way back, keeps the columns of its largest gradients: one dense gradient at a time."""

    @staticmethod
    def forward(ctx: Any, anchor, x, weight, bias, k: int, found: dict[str, torch.Tensor], name: str) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.found, ctx.name, ctx.k = found, name, k
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        dense = dy.flatten(0, -2).t().float() @ x.flatten(0, -2).float()
        ctx.found[ctx.name] = pack_indices(select_top_k(dense, ctx.k, "gradient"))
        return None, dy @ weight if ctx.needs_input_grad[1] else None, None, None, None, None, None


def select_by_gradient(model: NeuroAdaModel, adapter: str, backward: Callable[[], object]) -> None:
    """Choose the adapter's connections where |dL/dW| is largest.

    `backward` runs the model on one batch, every layer once, and the loss's backward; the same batch on every rank, so
    that the choice does not depend on their number. Nothing trains meanwhile: no parameter gets a gradient. Memory: one
    layer's dense gradient at a time, in fp32.
    """
    found: dict[str, torch.Tensor] = {}
    layers = model.adapted_layers(adapter)
    training = [param for param in model.parameters() if param.requires_grad]
    for param in training:
        param.requires_grad_(False)  # an engine's hooks would take this backward for a step's
    for layer in layers:
        layer.forward = _scouting(layer, adapter, found)  # type: ignore[method-assign]
    try:
        backward()
    finally:
        for layer in layers:
            del layer.forward
        for param in training:
            param.requires_grad_(True)
    for layer in layers:
        idx_bytes = found[layer.name]
        if dist.is_initialized():
            dist.broadcast(idx_bytes, 0)  # devices may round differently
        with layer.base.own_rows() as (rows, weight):
            layer.set_connections(adapter, rows, unpack_indices(idx_bytes)[rows].to(weight.device), weight)
    model.record_fingerprint(adapter)


def _scouting(layer: NeuroAdaLinear, adapter: str, found: dict[str, torch.Tensor]) -> Callable[..., torch.Tensor]:
    anchor = torch.zeros((), requires_grad=True)  # so that there is a backward, whatever x comes from

    def forward(x: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        k = sharding.shape(layer.neuroada_delta[adapter])[1]
        return _Scout.apply(anchor, x, weight, bias, k, found, layer.name)

    return forward
