"""PEFT's LoRA, of adapter.rank and adapter.lora_alpha; and DoRA, which trains the rows' magnitudes besides."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from neuroada import sharding
from neuroada.files import StoredTensor, open_tensors
from neuroada.methods.base import EVERYWHERE, Change
from neuroada.methods.peft_method import KEY_PREFIX, PeftMethod


class Lora(PeftMethod):
    name = "lora"
    sizes = "rank"
    prefix = "lora_"
    follows = frozenset({"exclude_modules", "layers"})
    strategies: ClassVar[tuple[str, ...]] = EVERYWHERE

    def describe(self) -> str:
        return f"LoRA, rank {self.adapter.rank}"

    def config(self, task_type: str) -> LoraConfig:
        rank, alpha = self.adapter.rank, self.adapter.lora_alpha
        return LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, task_type=task_type, **self.places)

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        torch.manual_seed(self.seed)  # of A's first values, whatever was drawn while the model was loaded
        return super().attach(model, task_type)

    def initialise(self, model: nn.Module) -> None:
        """The first values that PEFT draws in `attach` where the model has values: from the same seed, in its order."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for layer in model.modules():
                if isinstance(layer, LoraLayer):
                    self._start(layer)

    def _start(self, layer: Any) -> None:
        """Set one layer's A and B; one A whole in memory at a time."""
        a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        drawn = nn.Linear(layer.in_features, layer.r["default"], bias=False).weight.data
        nn.Linear(layer.r["default"], layer.out_features, bias=False)  # which PEFT draws before A's final values
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        rounded = drawn.to(layer.get_base_layer().weight.dtype)  # PEFT brings A to the base's dtype, then to fp32
        sharding.write_rows(a, slice(0, len(drawn)), rounded.to(sharding.stored(a).device))
        sharding.stored(b).zero_()

    @classmethod
    def changes(cls, saved: Path, base: Mapping[str, StoredTensor]) -> Iterator[Change]:
        config = LoraConfig.from_pretrained(str(saved))
        scale = config.lora_alpha / config.r
        with open_tensors(saved / SAFETENSORS_WEIGHTS_NAME) as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if not key.endswith(".lora_A.weight"):
                    continue
                a = file.get_tensor(key).float()
                b = file.get_tensor(key.replace(".lora_A.", ".lora_B.")).float()
                # |BA|^2 = trace(B'B AA'), without the product
                squared = scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
                module = key.removeprefix(KEY_PREFIX).removesuffix(".lora_A.weight")
                yield Change(module, squared, len(b) * a.shape[1])
