"""Bases that another library has quantised: bitsandbytes' Linear4bit and Linear8bitLt, torchao's weight-only tensors.

PEFT says which library a layer is of, and that library dequantises it, into a scratch weight for each product; it is
never written. The tensors are not plain bytes by rows, so they are for one process: engines shard
`neuroada.quantised`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import nn

from neuroada import sharding
from neuroada.adapter.base_weight import KINDS, BaseWeight
from neuroada.adapter.hooks import brought
from neuroada.errors import UserError

SERVED = ("bnb 4bit", "bnb 8bit", "torchao")
"""PEFT's names of what can be dequantised without a calibration of its own."""


class ForeignFormat:
    """A `WeightFormat` that asks the layer's library. `stored` is the layer's own weight: these are never sharded."""

    def __init__(self, layer: nn.Module, backend: Any) -> None:
        self.layer, self.backend = layer, backend

    def matrix(self, stored: torch.Tensor) -> torch.Tensor | None:
        return None

    def scratch(self, stored: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight: torch.Tensor = self.backend.get_base_weight(self.layer)
            return weight.detach()


class ForeignWeight(BaseWeight):
    """A layer quantised by bitsandbytes or torchao, whole in this process."""

    writable = False

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        backend = _backend(layer)
        if not sharding.is_whole(self.stored):
            raise UserError(
                f"a base quantised by {backend.backend_name} is not sharded: use one process, or base.model_dtype in a "
                f"recipe"
            )
        self.format = ForeignFormat(layer, backend)

    @staticmethod
    def serves(module: nn.Module) -> bool:
        backend = _backend(module) if isinstance(module, nn.Linear) else None
        return backend is not None and backend.backend_name in SERVED

    @contextmanager
    def own_rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        with brought(self.layer):
            yield slice(0, self.out_features), self.format.scratch(self.stored)

    def dequantised(self) -> nn.Linear:
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.format.scratch(self.stored), requires_grad=False)
        dense.register_parameter("bias", self.layer._parameters.get("bias"))
        return dense.train(self.layer.training)


def _backend(module: nn.Module) -> Any:
    # torchao's only wants what it would quantise with again, which is not done here.
    return resolve_quantization_backend(module, get_apply_tensor_subclass=lambda: None)


KINDS.append(ForeignWeight)
