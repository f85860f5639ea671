"""PEFT's DoRA: LoRA's direction, and the magnitude of each row besides."""

from typing import Any

import torch
from peft import LoraConfig

from neuroada import sharding
from neuroada.methods.base import WHOLE
from neuroada.methods.lora import Lora


class Dora(Lora):
    name = "dora"
    strategies = (*WHOLE, "fsdp2")
    unsupported = {  # noqa: RUF012 (a constant of the class)
        "zero3": "PEFT's DoRA measures the rows of weights that are partitioned by then"
    }

    def describe(self) -> str:
        return f"DoRA, rank {self.adapter.rank}"

    def config(self, task_type: str) -> LoraConfig:
        config = super().config(task_type)
        config.use_dora = True
        return config

    def _start(self, layer: Any) -> None:
        super()._start(layer)
        magnitude = layer.lora_magnitude_vector["default"].weight
        with sharding.own_rows(layer.get_base_layer().weight) as (rows, values):
            sharding.write_rows(magnitude, rows, torch.linalg.norm(values, dim=1))
