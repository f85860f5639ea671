"""PEFT's SHiRA: adapter.rank x (in + out) random entries of a weight, LoRA's budget at that rank."""

from functools import partial
from typing import Any

import torch
from peft import ShiraConfig
from torch import nn

from neuroada.methods.unsharded_peft_method import UnshardedPeftMethod


class Shira(UnshardedPeftMethod):
    name = "shira"
    sizes = "rank"
    prefix = "shira_"
    values = ".shira_weight"
    unsupported = {  # noqa: RUF012 (a constant of the class)
        "zero3": "PEFT's SHiRA reads the base weight without gathering its partitions"
    }

    def describe(self) -> str:
        return f"SHiRA, rank {self.adapter.rank}"

    def config(self, task_type: str) -> ShiraConfig:
        return ShiraConfig(r=self.adapter.rank, random_seed=self.seed, target_modules=self.targets, task_type=task_type)

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        if not any(param.is_meta for param in model.parameters()):
            return super().attach(model, task_type)
        return _attach_without_values(self, model, task_type)


def _attach_without_values(method: Shira, model: nn.Module, task_type: str) -> nn.Module:
    """For a plan: PEFT draws the entries by a mask of the weight, which on the meta device has no values to read."""
    from peft import get_peft_model
    from peft.tuners.shira import ShiraLayer

    config: Any = method.config(task_type)
    config.mask_fn = None
    tuned: nn.Module = get_peft_model(model, config)
    for layer in tuned.modules():
        if isinstance(layer, ShiraLayer):
            entries = layer.shira_weight["default"].numel()
            layer.shira_weight["default"] = nn.Parameter(torch.empty(entries, device="meta"))
            layer.shira_indices["default"] = torch.zeros(2, entries, dtype=torch.int)
            layer.get_delta_weight = partial(_dense_delta, layer)  # type: ignore[assignment]
    return tuned


def _dense_delta(layer: Any, adapter: str) -> torch.Tensor:
    """SHiRA's change as a dense tensor: fake tensors have no backward of sparse ones. (One temporary more.)"""
    values = layer.shira_weight[adapter]
    flat = torch.zeros(values.numel(), dtype=torch.int64, device=values.device)
    dense = values.new_zeros(layer.out_features * layer.in_features).index_put((flat,), values, accumulate=True)
    return dense.view(layer.out_features, layer.in_features)
