"""PEFT's Super-Tuning: the (1 - adapter.sparsity) largest entries of a weight, whatever their row."""

from collections.abc import Callable
from typing import Any

import torch
from peft import SupertuningConfig
from peft.tuners.supertuning import SupertuningLayer

from neuroada import sharding
from neuroada.methods.sparse_peft_method import SparsePeftMethod


class SuperTuning(SparsePeftMethod):
    name = "supertuning"
    sizes = "sparsity"
    prefix = "supertuning_"
    values = ".supertuning_values"
    layer_type = SupertuningLayer

    def match(self, budget: int, count: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
        """A share of each weight, to six digits: what trains at 0 and at 0.5 says what a share trains."""
        everything, half = (count({self.sizes: sparsity}) for sparsity in (0.0, 0.5))
        entries = 2 * (everything - half)  # without a classifier, which trains whole
        share = (budget - (everything - entries)) / entries
        return {self.sizes: round(1 - min(1.0, max(1e-6, share)), 6)}

    def describe(self) -> str:
        return f"Super-Tuning, sparsity {self.adapter.sparsity}"

    def config(self, task_type: str) -> SupertuningConfig:
        return SupertuningConfig(sparsity=self.adapter.sparsity, target_modules=self.targets, task_type=task_type)

    def entries(self, layer: Any) -> torch.Tensor:
        """[entries] int32, positions in the flattened weight; by PEFT's call, so that ties fall as they do there."""
        with sharding.whole(layer.get_base_layer().weight) as weight:
            chosen = torch.topk(weight.abs().flatten(), k=len(layer.supertuning_indices["default"]), largest=True)
        return chosen.indices.to(torch.int)
