"""NeuroAda's connections, tuned the mask-based way: whole weights train, a mask clears all other gradients."""

from typing import Any

import torch
from torch import nn

from neuroada.adapter.selection import NEEDS, lift_scores, select_top_k
from neuroada.errors import UserError
from neuroada.hf.head import HEADS, in_head
from neuroada.methods.whole_weights import WholeWeights


class Masked(WholeWeights):
    name = "masked"
    selects = True
    unsupported = {  # noqa: RUF012 (a constant of the class)
        "zero3": "the mask would have to be partitioned as the gradient is"
    }

    def describe(self) -> str:
        told = f"masked tuning, k = {self.adapter.k}"
        return told if self.adapter.selection == "magnitude" else f"{told}, {self.adapter.selection} selection"

    def check(self, strategy: str) -> None:
        super().check(strategy)
        if decay := self.recipe.optimizer.weight_decay:
            raise UserError(
                f"optimizer.weight_decay = {decay}: with adapter.method = masked it would also shrink the weights "
                f"under the mask; set it to 0"
            )
        if self.adapter.selects_later:
            raise UserError(
                "adapter.selection: method masked chooses by the weights alone; use magnitude, lift, reverse or "
                "random, and no selection_file"
            )

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        if isinstance(self.adapter.target_modules, str):
            raise UserError("adapter.target_modules = all-linear: method masked takes a list of names")
        model.requires_grad_(False)
        for name in HEADS:
            getattr(model, name, nn.Identity()).requires_grad_(task_type == "SEQ_CLS")  # whole, as beside an adapter
        inside = [(name, module) for name, module in model.named_modules() if not in_head(name)]
        shared = _shared_weights(model)
        for target in self.adapter.target_modules:
            layers = [(name, module) for name, module in inside if f".{name}".endswith(f".{target}")]
            if not layers or not all(isinstance(layer, nn.Linear) for _, layer in layers):
                raise UserError(f"adapter.target_modules: {target!r} is no Linear module of the model")
            for name, layer in layers:
                self._mask(name, layer, shared)
        return model

    def _mask(self, name: str, layer: Any, shared: set[int]) -> None:
        """Let the layer's weight train at its chosen entries."""
        weight = layer.weight
        if self.adapter.k > weight.shape[1]:
            raise UserError(f"adapter.k = {self.adapter.k}: a neuron of {name} has only {weight.shape[1]} inputs")
        if id(weight) in shared:
            raise UserError(
                f"adapter.target_modules: {name} shares its weight with another module, which would change with it; "
                f"leave it out"
            )
        scores = weight.data
        if NEEDS[self.adapter.selection] == "matrix":
            scores = lift_scores(weight.data, self.adapter.lift_rank, name)
        chosen = select_top_k(scores, self.adapter.k, self.adapter.selection, seed=self.seed)
        layer.register_buffer(
            "gradient_mask", torch.zeros_like(weight, dtype=torch.bool).scatter_(1, chosen, True), persistent=False
        )
        weight.requires_grad_(True)
        weight.register_hook(lambda grad: grad * layer.gradient_mask)

    def kind(self, name: str) -> str:
        return "mask" if name.endswith(".gradient_mask") else "weights"

    def trainable(self, model: nn.Module) -> int:
        """Under a mask fewer than the optimizer holds."""
        masked = [module for module in model.modules() if hasattr(module, "gradient_mask")]
        weights = [module.get_parameter("weight") for module in masked]
        hidden = sum(weight.numel() - self.adapter.k * len(weight) for weight in weights)
        return super().trainable(model) - hidden


def _shared_weights(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules use."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, param in model.named_parameters(remove_duplicate=False):
        (shared if id(param) in seen else seen).add(id(param))
    return shared
