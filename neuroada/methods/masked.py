"""NeuroAda's connections, tuned the mask-based way: whole weights train, a mask clears all other gradients."""

from typing import Any

import torch
from torch import nn

from neuroada import sharding
from neuroada.adapter.selection import NEEDS, lift_scores, select_top_k
from neuroada.errors import UserError
from neuroada.hf.head import HEADS, in_head
from neuroada.methods.base import EVERYWHERE
from neuroada.methods.whole_weights import WholeWeights

MASK_DTYPE = torch.uint8
"""Bytes: bool travels neither over NCCL nor gloo."""


class Masked(WholeWeights):
    name = "masked"
    sizes = "k"
    selects = True
    strategies = EVERYWHERE

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
        if self.adapter.k > layer.in_features:
            raise UserError(f"adapter.k = {self.adapter.k}: a neuron of {name} has only {layer.in_features} inputs")
        if id(weight) in shared:
            raise UserError(
                f"adapter.target_modules: {name} shares its weight with another module, which would change with it; "
                f"leave it out"
            )
        # A parameter of the layer, so that it is sharded and gathered as the weight is.
        mask = torch.zeros(sharding.shape(weight), dtype=MASK_DTYPE, device=weight.device)
        if not weight.is_meta:
            with sharding.own_rows(weight) as (rows, values):
                mask = sharding.join_rows(weight, self._chosen(name, weight, values, rows))
        layer.gradient_mask = nn.Parameter(mask, requires_grad=False)
        sharding.adopt(layer, weight, [layer.gradient_mask])
        weight.requires_grad_(True)
        weight.register_hook(lambda grad: grad * layer.gradient_mask)

    def _chosen(self, name: str, weight: torch.Tensor, values: torch.Tensor, rows: slice) -> torch.Tensor:
        """1 at the entries that train, else 0, of these `rows` of the weight, whose `values` they are. Collective."""
        scores = values
        if NEEDS[self.adapter.selection] == "matrix":
            scores = lift_scores(sharding.join_rows(weight, values), self.adapter.lift_rank, name)[rows]
        chosen = select_top_k(scores, self.adapter.k, self.adapter.selection, first_row=rows.start, seed=self.seed)
        return torch.zeros_like(values, dtype=MASK_DTYPE).scatter_(1, chosen, 1)

    def initialise(self, model: nn.Module) -> None:
        """Choose on each rank's own rows; FSDP2's gradients are masked where they are kept, once they are reduced."""
        for name, layer in _masked(model):
            weight, mask = layer.weight, layer.gradient_mask
            with sharding.own_rows(weight) as (rows, values):
                sharding.write_rows(mask, rows, self._chosen(name, weight, values, rows))

            def clear(param: torch.Tensor, mask: torch.Tensor = mask) -> None:
                assert param.grad is not None
                sharding.stored(param.grad).mul_(sharding.stored(mask))

            weight.register_post_accumulate_grad_hook(clear)

    def checkpoint_has(self, name: str) -> bool:
        return self.kind(name) != "mask"

    def kind(self, name: str) -> str:
        return "mask" if name.endswith(".gradient_mask") else "weights"

    def trainable(self, model: nn.Module) -> int:
        """Under a mask fewer than the optimizer holds."""
        shapes = [sharding.shape(layer.weight) for _, layer in _masked(model)]
        return super().trainable(model) - sum(shape.numel() - self.adapter.k * shape[0] for shape in shapes)


def _masked(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "gradient_mask")]


def _shared_weights(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules use."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, param in model.named_parameters(remove_duplicate=False):
        (shared if id(param) in seen else seen).add(id(param))
    return shared
