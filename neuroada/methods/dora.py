"""PEFT's DoRA: LoRA's direction, and the magnitude of each row besides."""

from peft import LoraConfig

from neuroada.methods.base import WHOLE
from neuroada.methods.lora import Lora


class Dora(Lora):
    name = "dora"
    strategies = WHOLE
    unsupported = {  # noqa: RUF012 (a constant of the class)
        **Lora.unsupported,
        "zero3": "PEFT's DoRA measures the rows of weights that are partitioned by then",
    }

    def describe(self) -> str:
        return f"DoRA, rank {self.adapter.rank}"

    def config(self, task_type: str) -> LoraConfig:
        config = super().config(task_type)
        config.use_dora = True
        return config
