"""One process, one device."""

from collections.abc import Callable

import torch
from torch import nn

from neuroada.training.attention import choose_attention
from neuroada.training.engines import STATE, Reader, adamw, find_device, trained
from neuroada.training.model import attach, load_base
from neuroada.training.recipe import Recipe


class SingleEngine:
    rank, world_size = 0, 1

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.device = find_device()

    def load(self, dtype: torch.dtype) -> nn.Module:
        attention = choose_attention(self.recipe, self.device)
        base = load_base(self.recipe, dtype, attention).to(self.device)
        return attach(base, self.recipe.adapter, self.recipe.train.seed)

    def start(self, model: nn.Module, micro_batches: int) -> None:
        self.model = model
        self.optimizer = adamw(model, self.recipe)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        params = [param for _, param in trained(self.model)]
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
        for name, param in trained(self.model):
            saved = read(name, param)
            param.data.copy_(saved["value"])
            self.optimizer.state[param] = {
                "step": torch.tensor(float(step)),
                **{key: saved[key].to(param.device) for key in STATE},
            }


def make(recipe: Recipe) -> SingleEngine:
    return SingleEngine(recipe)
