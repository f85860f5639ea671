"""selection = gradient: the connections whose loss gradient is largest, summed over one batch or over many.

One batch: a layer's dense gradient exists while its backward runs, and its connections are chosen then. Several: each
rank keeps the sum over the batches so far of its own rows, in fp32; its connections are chosen in the last batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from neuroada import sharding
from neuroada.adapter.layer import NeuroAdaLinear
from neuroada.adapter.model import NeuroAdaModel
from neuroada.adapter.selection import select_top_k
from neuroada.errors import UserError
from neuroada.ops import WeightFormat, pack_indices, unpack_indices


class _Scout(torch.autograd.Function):
    """A Linear that, on its way back, shows its dense gradient [out, in], fp32, to `show`."""

    @staticmethod
    def forward(ctx: Any, anchor, x, stored, bias, weight_format: WeightFormat, show: Callable) -> torch.Tensor:
        ctx.save_for_backward(x, stored)
        ctx.weight_format, ctx.show = weight_format, show
        return F.linear(x, _matrix(stored, weight_format), bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        x, stored = ctx.saved_tensors
        ctx.show(dy.flatten(0, -2).t().float() @ x.flatten(0, -2).float())
        dx = dy @ _matrix(stored, ctx.weight_format) if ctx.needs_input_grad[1] else None
        return None, dx, None, None, None, None


def _matrix(stored: torch.Tensor, weight_format: WeightFormat) -> torch.Tensor:
    matrix = weight_format.matrix(stored)
    return weight_format.scratch(stored) if matrix is None else matrix


class _Sum:
    """A layer's gradient over the batches, of the rows this rank works on; in the last one its connections are chosen.

    chosen: [rows, 2k] uint8.
    """

    def __init__(self, layer: NeuroAdaLinear, adapter: str, batches: int) -> None:
        self.name, self.k = layer.name, sharding.shape(layer.neuroada_delta[adapter])[-1]
        with layer.base.own_rows() as (self.rows, _):
            pass
        self.missing = batches
        self.total: torch.Tensor | None = None
        self.chosen: torch.Tensor | None = None

    def add(self, dense: torch.Tensor) -> None:
        if not self.missing:
            raise UserError(
                f"selection = gradient: {self.name} runs more than once in a pass; leave it out of target_modules"
            )
        self.missing -= 1
        own = dense[self.rows]
        if self.total is not None:
            self.total.add_(own)
        else:
            self.total = own.clone() if self.missing else own  # a view would keep the other ranks' rows
        if not self.missing:
            self.chosen, self.total = pack_indices(select_top_k(self.total, self.k, "gradient")), None

    def connections(self) -> torch.Tensor:
        if self.chosen is None:
            raise UserError(
                f"selection = gradient: no gradient reached {self.name} in some pass; leave it out of target_modules"
            )
        return self.chosen


def select_by_gradient(
    model: NeuroAdaModel, adapter: str, backward: Callable[[], object] | Sequence[Callable[[], object]]
) -> None:
    """Choose the adapter's connections where |dL/dW| is largest.

    backward: runs the model on one batch, every layer once, and the loss's backward; or several such functions, over
    whose batches the gradients are summed. The same batches on every rank, so that the choice does not depend on their
    number. Nothing trains meanwhile: no parameter gets a gradient.

    Memory: of one batch, one layer's dense gradient at a time, in fp32. Of several, besides, one fp32 value for every
    entry of this rank's rows of the adapted weights, however many batches there are.
    """
    batches = [backward] if callable(backward) else list(backward)
    layers = model.adapted_layers(adapter)
    sums = {layer.name: _Sum(layer, adapter, len(batches)) for layer in layers}
    training = [param for param in model.parameters() if param.requires_grad]
    for param in training:
        param.requires_grad_(False)  # an engine's hooks would take this backward for a step's
    for layer in layers:
        layer.forward = _scouting(layer, sums[layer.name].add)  # type: ignore[method-assign]
    try:
        for one in batches:
            one()
    finally:
        for layer in layers:
            del layer.forward
        for param in training:
            param.requires_grad_(True)
    for layer in layers:
        idx_bytes = layer.base.join_rows(sums[layer.name].connections())
        if dist.is_initialized():
            dist.broadcast(idx_bytes, 0)  # of whole weights: devices may round differently
        with layer.base.own_rows() as (rows, weight):
            layer.set_connections(adapter, rows, unpack_indices(idx_bytes)[rows].to(weight.device), weight)
    model.record_fingerprint(adapter)


def _scouting(layer: NeuroAdaLinear, show: Callable[[torch.Tensor], None]) -> Callable[..., torch.Tensor]:
    anchor = torch.zeros((), requires_grad=True)  # so that there is a backward, whatever x comes from

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Scout.apply(anchor, x, layer.base.stored, layer.base.bias, layer.base.format, show)
        return y if layer.base.added_bias is None else y + layer.base.added_bias

    return forward
