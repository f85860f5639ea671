"""PEFT's SHiRA: adapter.rank x (in + out) random entries of a weight, LoRA's budget at that rank."""

from functools import partial
from typing import Any

import torch
from peft import ShiraConfig, get_peft_model
from peft.tuners.shira import ShiraLayer
from peft.tuners.shira.mask_functions import random_mask
from torch import nn

from neuroada.hf.head import train_head_in_fp32
from neuroada.methods.sparse_peft_method import SparsePeftMethod


class Shira(SparsePeftMethod):
    name = "shira"
    sizes = "rank"
    prefix = "shira_"
    values = ".shira_weight"
    layer_type = ShiraLayer

    def describe(self) -> str:
        return f"SHiRA, rank {self.adapter.rank}"

    def config(self, task_type: str) -> ShiraConfig:
        return ShiraConfig(r=self.adapter.rank, random_seed=self.seed, target_modules=self.targets, task_type=task_type)

    def attach_whole(self, model: nn.Module, task_type: str) -> nn.Module:
        if not any(param.is_meta for param in model.parameters()):
            return super().attach_whole(model, task_type)
        tuned = self.attach_without_mask(model, task_type)
        for layer in self._layers(tuned):
            set_entries(layer, torch.zeros(2, layer.shira_weight["default"].numel(), dtype=torch.int))
        return tuned

    def attach_without_mask(self, model: nn.Module, task_type: str) -> nn.Module:
        """PEFT draws the entries by a mask of the weight, which on the meta device has no values to read: none then."""
        config: Any = self.config(task_type)
        config.mask_fn = None
        tuned: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=True)
        train_head_in_fp32(tuned)
        return tuned

    def initialise(self, model: nn.Module) -> None:
        super().initialise(model)
        for layer in self._layers(model):
            layer.__dict__.pop("get_delta_weight", None)  # PEFT's own from here on: there are entries

    def entries(self, layer: Any) -> torch.Tensor:
        """[2, entries] int32. Random ones, by the shape alone: PEFT's function is shown a module of that shape."""
        shown = nn.Linear(1, 1)
        shown.in_features, shown.out_features = layer.in_features, layer.out_features
        mask: Any = random_mask(shown, layer.r["default"], self.seed)
        return torch.stack(torch.where(mask)).to(torch.int)


def set_entries(layer: Any, entries: torch.Tensor) -> None:
    """Give the layer these entries, [2, entries] int32, with values of 0; on the meta device, until `initialise`."""
    weight = layer.get_base_layer().weight
    layer.shira_weight["default"] = nn.Parameter(torch.zeros(entries.shape[1], device=weight.device))
    layer.shira_indices["default"] = entries if weight.is_meta else entries.to(weight.device)
    if weight.is_meta:
        layer.get_delta_weight = partial(_dense_delta, layer)


def _dense_delta(layer: Any, adapter: str) -> torch.Tensor:
    """SHiRA's change as a dense tensor: fake tensors have no backward of sparse ones. (One temporary more.)"""
    values = layer.shira_weight[adapter]
    flat = torch.zeros(values.numel(), dtype=torch.int64, device=values.device)
    dense = values.new_zeros(layer.out_features * layer.in_features).index_put((flat,), values, accumulate=True)
    return dense.view(layer.out_features, layer.in_features)
