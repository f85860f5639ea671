"""One process, one device."""

from collections.abc import Callable

import torch
from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.engines.base import STATE, ModelBuilder, Reader, adamw, find_device, trainable_parameters


class SingleEngine:
    strategy = "single"
    rank, world_size = 0, 1

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.device = find_device()

    def describe(self) -> str:
        return self.strategy

    def load(self, builder: ModelBuilder) -> nn.Module:
        return builder.attach(builder.pretrained(self.device).to(self.device))

    def start(self, model: nn.Module, micro_batches: int) -> None:
        self.model = model
        self.optimizer = adamw(model, self.recipe)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        params = [param for _, param in trainable_parameters(self.model)]
        limit = self.recipe.optimizer.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(params, limit)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    def release(self) -> None:
        pass  # nothing is gathered

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def moments(self, param: nn.Parameter) -> dict[str, torch.Tensor]:
        return {name: self.optimizer.state[param][name] for name in STATE}

    def restore(self, step: int, read: Reader, backward_once: Callable[[], object]) -> None:
        for name, param in trainable_parameters(self.model):
            saved = read(name, param)
            param.data.copy_(saved["value"])
            self.optimizer.state[param] = {
                "step": torch.tensor(float(step)),
                **{key: saved[key].to(param) for key in STATE},
            }
