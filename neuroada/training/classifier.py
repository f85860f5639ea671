"""An encoder with a classifier on top: its transformers class, and the classifier's dtype and first values.

The classifier is one of PEFT's `modules_to_save`: trained whole and saved with the adapter. PEFT leaves what is inside
it (RoBERTa's `classifier.dense`) out of the adapter's target modules.
"""

from typing import Any, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from neuroada import sharding
from neuroada.tasks.table import get_task

NAMES = ("classifier", "score")  # what transformers and PEFT call it


def auto_class(task: str) -> tuple[Any, dict[str, Any]]:
    """The transformers class that a task's model is loaded with, and the arguments it takes for that."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    labels = get_task(task).num_labels
    return (AutoModelForSequenceClassification, {"num_labels": labels}) if labels else (AutoModelForCausalLM, {})


def has_classifier(model: nn.Module) -> bool:
    return any(hasattr(model, name) for name in NAMES)


def train_in_fp32(model: nn.Module) -> None:
    """Give the classifier of a PEFT model fp32 weights, as deltas have, whatever the encoder's dtype."""
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            wrapper.modules_to_save.float()
            wrapper.register_forward_pre_hook(lambda _, args: tuple(value.float() for value in args))


def is_classifier(name: str) -> bool:
    """Whether this parameter of a PEFT model is the classifier's: the trained copy's or the unused original's."""
    return ".modules_to_save." in name or ".original_module." in name


def start_classifier(model: nn.Module, seed: int) -> None:
    """Set the classifier's first values, from the seed alone: the same for every engine and world size. Collective.

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
