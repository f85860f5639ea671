"""A classification head on top of an encoder: which parameters it is, its dtype and its first values.

With an adapter the head is one of PEFT's `modules_to_save`: trained whole and saved with the adapter. PEFT leaves what
is inside it (RoBERTa's `classifier.dense`) out of the adapter's target modules.
"""

from typing import Any, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from neuroada import sharding

HEADS = ("classifier", "score")
"""What transformers and PEFT call it."""


def in_head(module: str) -> bool:
    """Whether this module of a bare model is the head, or inside it."""
    return module.split(".")[0] in HEADS


def is_head(name: str) -> bool:
    """Whether this parameter of a PEFT model is the head's: the trained copy's or the unused original's."""
    return ".modules_to_save." in name or ".original_module." in name


def train_head_in_fp32(model: nn.Module) -> None:
    """Give the head of a PEFT model fp32 weights, as deltas have, whatever the encoder's dtype."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.modules_to_save.float()
            wrapper.register_forward_pre_hook(lambda _, args: tuple(value.float() for value in args))


def hold_head_in_fp32(model: nn.Module) -> None:
    """Give the head of a bare model fp32 weights: what an adapter saved of it is then loaded unrounded."""
    for name in HEADS:
        getattr(model, name, nn.Identity()).float()


def start_head(model: nn.Module, seed: int) -> None:
    """Set the head's first values, from the seed alone: the same for every engine and world size. Collective.

    As transformers draws them: weights from N(0, initializer_range), biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    deviation: float = cast(Any, model).config.initializer_range
    for name, param in model.named_parameters():
        if ".modules_to_save." in name:
            shape = sharding.shape(param)
            values = torch.zeros(shape)
            if len(shape) > 1:
                values.normal_(0.0, deviation, generator=generator)
            sharding.write_rows(param, slice(0, shape[0]), values.to(param.device))
