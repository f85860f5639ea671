"""selection = wanda: the connections whose |w| x the L2 norm of their inputs is largest, over batches of examples."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from neuroada import sharding
from neuroada.adapter.layer import NeuroAdaLinear
from neuroada.adapter.model import NeuroAdaModel
from neuroada.adapter.rounds import Rounds
from neuroada.adapter.selection import select_top_k, wanda_scores
from neuroada.errors import UserError


class _Inputs:
    """The sums of squares of a layer's inputs, [in] float64, over the tokens it has seen: in this pass, and in all."""

    def __init__(self, layer: NeuroAdaLinear, padding: "_Padding") -> None:
        self.layer, self.padding = layer, padding
        self.squares: torch.Tensor | None = None
        self.total: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.padding.without(x).detach().float().square().sum(0, dtype=torch.float64)
        self.squares = seen if self.squares is None else self.squares + seen
        y: torch.Tensor = self.layer.base_layer(x)
        return y

    def end_round(self, rounds: Rounds, device: torch.device) -> None:
        """Add what each rank's pass has seen. device: of this rank's passes. Collective."""
        if self.squares is None and rounds.ranks > 1:  # another rank's pass may have reached it
            self.squares = torch.zeros(self.layer.in_features, dtype=torch.float64, device=device)
        if self.squares is not None:
            for part in rounds.each(self.squares):
                self.total = part if self.total is None else self.total + part
            self.squares = None


class _Padding:
    """The attention mask of the pass that runs, by which padding is left out."""

    mask: torch.Tensor | None = None

    def note(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.mask = kwargs.get("attention_mask")

    def without(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [real tokens, in]."""
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            return x[self.mask.bool()]
        return x.flatten(0, -2)


def select_by_activations(
    model: NeuroAdaModel, adapter: str, forward: Callable[[], object] | Sequence[Callable[[], object]]
) -> None:
    """Choose the adapter's connections where |w| x the L2 norm of the layer's input is largest.

    forward: runs the model on one batch; or several such functions, over whose batches the squares are summed. The same
    on every rank: the ranks share the passes, and the choice does not depend on how many there are. Padding is left out
    by the `attention_mask` the model is called with. Memory: two float64 values for each input of each layer.
    """
    layers = model.adapted_layers(adapter)
    if not layers:
        raise UserError(f"adapter = {adapter!r}: no layer has it; name one of {', '.join(model.peft_config)}")
    padding = _Padding()
    inputs = {layer.name: _Inputs(layer, padding) for layer in layers}
    rounds = Rounds([forward] if callable(forward) else forward)
    with torch.no_grad(), _watching(model, layers, inputs, padding):
        for one in rounds:
            one()
            reached = [seen.squares.device for seen in inputs.values() if seen.squares is not None]
            for seen in inputs.values():
                seen.end_round(rounds, reached[0] if reached else seen.layer.base.stored.device)
    for layer in layers:
        squares = inputs[layer.name].total
        if squares is None or not squares.any():
            raise UserError(f"selection = wanda: no token reaches {layer.name}; leave it out, or give more examples")
        k = sharding.shape(layer.neuroada_delta[adapter])[-1]
        with layer.base.own_rows() as (rows, weight):
            layer.set_connections(adapter, rows, select_top_k(wanda_scores(weight, squares), k, "wanda"), weight)
    model.record_fingerprint(adapter)


@contextmanager
def _watching(
    model: NeuroAdaModel, layers: list[NeuroAdaLinear], inputs: dict[str, _Inputs], padding: _Padding
) -> Iterator[None]:
    for layer in layers:
        layer.forward = inputs[layer.name].forward  # type: ignore[method-assign]
    # PEFT calls the one or the other, by the task's type.
    hooks = [part.register_forward_pre_hook(padding.note, with_kwargs=True) for part in (model, model.model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            del layer.forward
