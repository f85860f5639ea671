"""The interface of an engine, of the model builder it is given, and what all engines share.

A new engine is a class with these methods and a line in neuroada/registry.py; where it stores parameters in a way of
its own, a module of neuroada/sharding as well. Each one stands directly on its library's public API: accelerate's
wrappers fall back to unsharded training on a CPU without a word (accelerate 1.15).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from neuroada import sharding
from neuroada.config.recipe import Recipe
from neuroada.environment import local_rank, world_size
from neuroada.errors import UserError
from neuroada.quantised import QuantisedLinear
from neuroada.registry import ENGINES

STATE = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, by torch's names."""


Reader = Callable[[str, nn.Parameter], dict[str, torch.Tensor]]
"""Of a trainable parameter's name and itself: its full tensors value, exp_avg and exp_avg_sq."""


class ModelBuilder(Protocol):
    """Makes the recipe's model in the form an engine asks for. An engine knows nothing of methods and objectives."""

    source: str  # the base model: hub id or folder
    dtype: torch.dtype  # of its weights

    def pretrained(self, device: torch.device) -> nn.Module:
        """The base model with its values, in host memory (or partitioned as it loads, under DeepSpeed ZeRO-3);
        `device` is where it will run."""

    def empty(self, device: torch.device) -> nn.Module:
        """The base model on the meta device; buffers are real."""

    def attach(self, base: nn.Module) -> nn.Module:
        """The base with what trains attached."""

    def checkpoint_has(self, name: str) -> bool:
        """Whether this parameter of the attached model has its values from the base model's files."""

    def initialise(self, model: nn.Module) -> None:
        """Set what `attach` added to an empty model, once the base's values are loaded. Collective."""


class Engine(Protocol):
    """What the training loop needs of an engine.

    strategy: how parameters and optimizer state are stored: single, zero1, zero2, zero3 or fsdp2.
    """

    strategy: str
    rank: int
    world_size: int
    device: torch.device
    model: nn.Module  # callable with a micro batch's inputs once `start` has run

    def describe(self) -> str:
        """The strategy in words, for the block that a run prints at its start."""

    def load(self, builder: ModelBuilder) -> nn.Module:
        """The model with what trains attached, stored the engine's way from the start."""

    def start(self, model: nn.Module, micro_batches: int) -> None:
        """Take the loaded model, ready to train; `micro_batches` of each rank make a step."""

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of this micro batch's part of the loss: the parts of all ranks and micro batches add up to it."""

    def step(self, lr: float) -> float:
        """Clip, take an AdamW step at `lr`, clear the gradients; returns their norm before clipping."""

    def release(self) -> None:
        """Let go of what a pass that was no part of a step has left gathered."""

    def reduce(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small tensor over ranks."""

    def moments(self, param: nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's two moments of a trainable parameter, full, fp32. Collective."""

    def restore(self, step: int, read: Reader, backward_once: Callable[[], object]) -> None:
        """Set values and moments of every trainable parameter from `read`, and AdamW's step count. Collective.

        `backward_once` runs the micro batches of a step, for an engine that has no moments before a first step.
        """


def make_engine(recipe: Recipe) -> Engine:
    """The recipe's engine, with the process group it needs."""
    ranks = world_size()
    name = recipe.engine.name
    if name == "single" and ranks > 1:
        raise UserError(f"engine.name = single: started with {ranks} ranks; use deepspeed or fsdp2")
    if name != "single" and "RANK" not in os.environ:
        name = "single"  # started without a launcher, it is one process whatever the recipe says
    made: Any = ENGINES.load(name)
    return made(recipe)


def find_device() -> torch.device:
    """This rank's device: its GPU by LOCAL_RANK, or the CPU."""
    if torch.cuda.is_available():
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK = {local_rank()}: this node has {torch.cuda.device_count()} GPU(s); start as many ranks"
            )
        torch.cuda.set_device(local_rank())
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train, by name."""
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def base_parameters(model: nn.Module) -> int:
    """How many parameters the base model has, as its card counts them: what an adapter has added is left out."""
    tuner = getattr(model, "base_model", None)  # of a model that PEFT wrapped; its own names begin with `prefix`
    added = (f".{getattr(tuner, 'prefix', 'neuroada_delta')}", ".neuroada_idx.", ".modules_to_save.", ".gradient_mask")
    counted = (param for name, param in model.named_parameters() if not any(part in name for part in added))
    packed = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    hidden = sum(layer.out_features * (layer.in_features - layer.rows.row_bytes) for layer in packed)
    return sum(sharding.shape(param).numel() for param in counted) + hidden


def adamw(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the published constants: betas (0.9, 0.999), eps 1e-8."""
    params = [param for _, param in trainable_parameters(model)]
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
