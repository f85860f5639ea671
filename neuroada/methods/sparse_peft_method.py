"""PEFT tuners that train a vector of values a layer, at entries of its weight that are chosen once.

The values are sharded. The entries' indices are no parameters in PEFT: every rank has those of every layer, whole.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from neuroada import sharding
from neuroada.adapter.saved import save_adapter
from neuroada.hf.head import in_head
from neuroada.methods.base import EVERYWHERE
from neuroada.methods.peft_method import PeftMethod


class SparsePeftMethod(PeftMethod):
    """layer_type: PEFT's class of an adapted layer, which has `<prefix>indices` and, named as `values`, its values."""

    layer_type: ClassVar[type[BaseTunerLayer]]
    strategies: ClassVar[tuple[str, ...]] = EVERYWHERE

    @abstractmethod
    def entries(self, layer: Any) -> torch.Tensor:
        """The indices of the layer's entries, as PEFT chooses and stores them. Collective where it is sharded."""

    def attach_whole(self, model: nn.Module, task_type: str) -> nn.Module:
        """`attach`, to weights that are whole; or on the meta device, where no entry is chosen yet."""
        return super().attach(model, task_type)

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        if all(sharding.is_whole(param) for param in model.parameters()):
            return self.attach_whole(model, task_type)
        with _without_values(model):
            tuned = self.attach_whole(model, task_type)
        for layer in self._layers(tuned):
            weight, values = layer.get_base_layer().weight, self._values(layer)
            values["default"] = nn.Parameter(torch.zeros_like(values["default"], device=weight.device))
            sharding.adopt(layer, weight, [values["default"]])
        self.initialise(tuned)
        return tuned

    def initialise(self, model: nn.Module) -> None:
        for layer in self._layers(model):
            values = sharding.stored(self._values(layer)["default"])
            values.zero_()
            self._indices(layer)["default"] = self.entries(layer).to(values.device)

    def prepare(self, model: nn.Module, device: torch.device, compute: torch.dtype) -> None:
        """Bring the indices where passes are computed: values and weights may be offloaded, indices are not."""
        for layer in self._layers(model):
            indices = self._indices(layer)
            if not indices["default"].is_meta:  # of a plan
                indices["default"] = indices["default"].to(device)

    def whole_indices(self, model: nn.Module) -> int:
        return sum(self._indices(layer)["default"].nbytes for layer in self._layers(model))

    def save(self, model: nn.Module, folder: Path) -> None:
        peft_model: Any = model
        peft_model.peft_config["default"].base_model_name_or_path = self.recipe.model
        save_adapter(peft_model, folder, complete=partial(self.complete, model))

    def complete(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Add the indices to the values, by the names of an adapter's file."""
        for name, layer in model.named_modules():
            if isinstance(layer, self.layer_type):
                tensors[f"{name}.{self.prefix}indices"] = self._indices(layer)["default"].cpu()

    def _layers(self, model: nn.Module) -> list[Any]:
        return [module for module in model.modules() if isinstance(module, self.layer_type)]

    def _values(self, layer: Any) -> Any:
        return getattr(layer, self.values.removeprefix("."))

    def _indices(self, layer: Any) -> Any:
        return getattr(layer, f"{self.prefix}indices")


@contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    """While the block runs, the weights that may be adapted stand on the meta device, of their whole shapes.

    PEFT reads a weight's shape, and chooses by its values, where a partitioned one has neither. It copies the head.
    """
    inside = [module for name, module in model.named_modules() if not in_head(name)]
    weights = {module: module.weight for module in inside if isinstance(module, nn.Linear)}
    for module, weight in weights.items():
        empty = torch.empty(sharding.shape(weight), dtype=weight.dtype, device="meta")
        module.weight = nn.Parameter(empty, weight.requires_grad)
    try:
        yield
    finally:
        for module, weight in weights.items():
            weight.requires_grad_(module.weight.requires_grad)  # frozen, where PEFT has frozen what stood for it
            module.weight = weight
