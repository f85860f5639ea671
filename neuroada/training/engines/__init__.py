"""The engines: what holds the model and runs a step. One process, DeepSpeed ZeRO-1/2/3, FSDP2.

Each sits directly on its library's public API. (accelerate's wrappers fall back to unsharded training on CPU without a
word: accelerate 1.15.)
"""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from neuroada import sharding
from neuroada.errors import UserError
from neuroada.training.recipe import Recipe

STATE = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, by torch's names."""


Reader = Callable[[str, nn.Parameter], dict[str, torch.Tensor]]
"""Of a trained parameter's name and itself: its whole tensors value, exp_avg and exp_avg_sq."""


class Engine(Protocol):
    """What the training loop needs of an engine."""

    rank: int
    world_size: int
    device: torch.device
    model: nn.Module  # callable with a micro batch's inputs once `start` has run

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The recipe's model with its adapter attached, kept the engine's way from the start."""

    def start(self, model: nn.Module, micro_batches: int) -> None:
        """Take the model with its adapter, ready to train; `micro_batches` of each rank make a step."""

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of this micro batch's part of the loss: the parts of all ranks and micro batches add up to it."""

    def step(self, lr: float) -> float:
        """Clip, take an AdamW step at `lr`, clear the gradients; returns their norm before clipping."""

    def release(self) -> None:
        """Let go of what a pass that was no part of a step has left gathered."""

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over ranks."""

    def moments(self, param: nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's two moments of a trained parameter, whole, fp32. Collective."""

    def restore(self, step: int, read: Reader, backward_once: Callable[[], object]) -> None:
        """Set values and moments of every trained parameter from `read`, and AdamW's step count. Collective.

        `backward_once` runs the micro batches of a step, for an engine that has no moments before a first step.
        """


def make_engine(recipe: Recipe) -> Engine:
    """The recipe's engine, with the process group it needs."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    name = recipe.engine.name
    if name == "single" and ranks > 1:
        raise UserError(f"engine.name = single: started with {ranks} ranks; use deepspeed or fsdp2")
    if name != "single" and "RANK" not in os.environ:
        name = "single"  # `python launch/train.py` is one process whatever the recipe says
    return importlib.import_module(f"neuroada.training.engines.{name}").make(recipe)


def find_device() -> torch.device:
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train, by name."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def base_numel(model: nn.Module) -> int:
    """Parameters of the base model, as its card counts them: what an adapter has brought along is left out."""
    tuner = getattr(model, "base_model", None)  # of a model that PEFT wrapped; its own names begin with `prefix`
    brought = (f".{getattr(tuner, 'prefix', 'neuroada_')}", ".modules_to_save.")
    counted = (param for name, param in model.named_parameters() if not any(part in name for part in brought))
    return sum(sharding.shape(param).numel() for param in counted)


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the published constants: betas (0.9, 0.999), eps 1e-8."""
    params = [param for _, param in trained(model)]
    return torch.optim.AdamW(params, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Between steps, forward passes alone: no gradients, no dropout. Every rank runs as many of them."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()
    if isinstance(model, FSDPModule):
        model.reshard()  # the outermost module's parameters stay gathered for a backward that does not come
