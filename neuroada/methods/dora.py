"""PEFT's DoRA: LoRA's direction, and the magnitude of each row besides."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from neuroada import sharding
from neuroada.methods.lora import Lora


class Dora(Lora):
    name = "dora"

    def describe(self) -> str:
        return f"DoRA, rank {self.adapter.rank}"

    def config(self, task_type: str) -> LoraConfig:
        config = super().config(task_type)
        config.use_dora = True
        return config

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        tuned = super().attach(model, task_type)
        for layer in tuned.modules():
            if isinstance(layer, LoraLayer):
                base: Any = layer.get_base_layer()
                sharding.adopt(layer.lora_magnitude_vector["default"], base.weight, [])  # which takes its rows' norms
        return tuned

    def _start(self, layer: Any) -> None:
        super()._start(layer)
        magnitude = layer.lora_magnitude_vector["default"].weight
        with sharding.own_rows(layer.get_base_layer().weight) as (rows, values):
            sharding.write_rows(magnitude, rows, torch.linalg.norm(values, dim=1))
