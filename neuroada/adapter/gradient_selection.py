"""selection = gradient: the connections whose loss gradient is largest, summed over one batch or over many.

The ranks share the passes. A layer's dense gradient exists while its backward runs: then each rank takes its part of
the rows from every rank's, adds it to its sum, and in the last round chooses the connections of those rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from neuroada import sharding
from neuroada.adapter.layer import NeuroAdaLinear
from neuroada.adapter.model import NeuroAdaModel
from neuroada.adapter.rounds import Rounds
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


class _Sums:
    """The layers' gradients over the passes, of this rank's part of the rows, whose connections the last round chooses.

    By the layer's name: totals, [rows, in] fp32; chosen, [rows, 2k] uint8.
    """

    def __init__(self, layers: list[NeuroAdaLinear], adapter: str, rounds: Rounds) -> None:
        self.rounds = rounds
        self.k = {layer.name: sharding.shape(layer.neuroada_delta[adapter])[-1] for layer in layers}
        self.names = list(self.k)
        self.device = layers[0].base.stored.device
        self.reached: set[str] = set()  # in this round
        self.totals: dict[str, torch.Tensor] = {}
        self.chosen: dict[str, torch.Tensor] = {}

    def add(self, name: str, dense: torch.Tensor) -> None:
        self.device = dense.device
        self._meet(self.names.index(name))
        if name in self.reached:
            raise UserError(
                f"selection = gradient: {name} runs more than once in a pass; leave it out of target_modules"
            )
        self.reached.add(name)
        total = self.rounds.add_rows(self.totals.pop(name, None), dense)
        if self.rounds.last:
            self.chosen[name] = pack_indices(select_top_k(total, self.k[name], "gradient"))
        else:
            self.totals[name] = total

    def end_round(self) -> None:
        self._meet(len(self.names))
        if missed := [name for name in self.names if name not in self.reached]:
            raise UserError(
                f"selection = gradient: no gradient reached {missed[0]} in some pass; leave it out of target_modules"
            )
        self.reached.clear()

    def _meet(self, number: int) -> None:
        """Every rank's pass is at the layer of this number, or at its end: else they would wait for each other."""
        met = self.rounds.numbers(number, self.device)
        if len(met) > 1:
            names = ", ".join(self.names[number] for number in sorted(met) if number < len(self.names))
            raise UserError(
                f"selection = gradient: the ranks' passes reach different layers ({names}); leave those that not every "
                f"batch reaches out of target_modules"
            )


def select_by_gradient(
    model: NeuroAdaModel, adapter: str, backward: Callable[[], object] | Sequence[Callable[[], object]]
) -> None:
    """Choose the adapter's connections where |dL/dW| is largest.

    backward: runs the model on one batch, every layer once, and the loss's backward; or several such functions, over
    whose batches the gradients are summed. The same on every rank: the ranks share the passes, and the choice does not
    depend on how many there are. Nothing trains meanwhile: no parameter gets a gradient.

    Memory: while a layer's backward runs, its dense gradient in fp32 (on each of several ranks three of them). Where
    there are more batches than ranks, besides, one fp32 value for every entry of the adapted weights, divided evenly by
    the ranks, however the weights are stored and however many batches there are.
    """
    layers = model.adapted_layers(adapter)
    if not layers:
        raise UserError(f"adapter = {adapter!r}: no layer has it; name one of {', '.join(model.peft_config)}")
    rounds = Rounds([backward] if callable(backward) else backward)
    sums = _Sums(layers, adapter, rounds)
    training = [param for param in model.parameters() if param.requires_grad]
    for param in training:
        param.requires_grad_(False)  # an engine's hooks would take this backward for a step's
    for layer in layers:
        layer.forward = _scouting(layer, partial(sums.add, layer.name))  # type: ignore[method-assign]
    try:
        for one in rounds:
            one()
            sums.end_round()
    finally:
        for layer in layers:
            del layer.forward
        for param in training:
            param.requires_grad_(True)
    for layer in layers:
        idx = unpack_indices(rounds.join_rows(sums.chosen[layer.name], layer.out_features))
        with layer.base.own_rows() as (rows, weight):
            layer.set_connections(adapter, rows, idx[rows].to(weight.device), weight)
    model.record_fingerprint(adapter)


def _scouting(layer: NeuroAdaLinear, show: Callable[[torch.Tensor], None]) -> Callable[..., torch.Tensor]:
    anchor = torch.zeros((), requires_grad=True)  # so that there is a backward, whatever x comes from

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Scout.apply(anchor, x, layer.base.stored, layer.base.bias, layer.base.format, show)
        return y if layer.base.added_bias is None else y + layer.base.added_bias

    return forward
