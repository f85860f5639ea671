"""The interface of an objective. A new one is a subclass, a line in neuroada/registry.py, and tasks that name it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.data.mixing import Order
from neuroada.engines import Engine
from neuroada.errors import UserError
from neuroada.objectives.micro_batch import MicroBatch
from neuroada.objectives.validation import Validation
from neuroada.registry import OBJECTIVES
from neuroada.tasks.table import Task, get_task


class Data(Protocol):
    """The encoded training examples; str() says how many, and what was truncated or dropped."""

    @property
    def lengths(self) -> np.ndarray: ...  # [n] tokens of each

    def __len__(self) -> int: ...


class Objective(ABC):
    """What a recipe's task teaches.

    task_type: PEFT's name for it. loss_unit: of the training loss, in words. pipeline_tag: the hub's name for a model
    of this kind. generates: whether the trained model is scored by generating answers to evaluate.tasks; else
    `validation` scores it as it trains.
    """

    name: ClassVar[str]
    task_type: ClassVar[str]
    loss_unit: ClassVar[str]
    pipeline_tag: ClassVar[str]
    auto_name: ClassVar[str]  # the transformers class its model is loaded with
    generates: ClassVar[bool] = True
    vocabulary_head: ClassVar[bool] = True  # whether the model ends in a product with every token's embedding

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def task(self) -> Task:
        """The recipe's task, of objectives that tasks name."""
        assert self.recipe.task is not None
        return get_task(self.recipe.task)

    # ---- before weights are loaded

    def check(self) -> None:
        """UserError where the recipe does not fit the objective."""

    @abstractmethod
    def load_data(self, tokenizer: Any) -> Data:
        """Read and encode the training examples; also sets `data`, `tokenizer` and `data_fingerprint`.

        UserError where the examples or the tokenizer do not fit.
        """

    data: Data
    tokenizer: Any
    data_fingerprint: str  # of the examples, the same on every rank

    def auto_class(self) -> tuple[Any, dict[str, Any]]:
        """The transformers class of its model, and the options it is loaded with."""
        import transformers

        return getattr(transformers, self.auto_name), {}

    def write_data(self, folder: Path) -> None:
        """Write into the run's `folder` what a report says of the data, beyond their number."""

    def batch(self, step: int, size: int) -> np.ndarray:
        """The examples of optimizer step `step` (from 0), [size]: a function of the seed alone, for any engine, world
        size and micro batch. So the data position of a run is its step number."""
        return Order((len(self.data),), self.recipe.train.seed).batch(step, size)

    # ---- the model

    def checkpoint_has(self, name: str) -> bool:
        """Whether this parameter has its values from the base model's files, as far as the objective knows."""
        return True

    def start(self, model: nn.Module) -> None:
        """Set the first values of what the objective adds to the model. Collective."""

    @abstractmethod
    def collate(self, chosen: np.ndarray) -> MicroBatch:
        """The examples `chosen` as the tensors of one forward pass."""

    @abstractmethod
    def summed_loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Forward; the sum of what this batch loses, fp32."""

    @abstractmethod
    def normaliser(self, batch: np.ndarray) -> int:
        """What the summed loss of the examples `batch`, a global batch, is divided by: their tokens or their number."""

    def loss(self, model: nn.Module, chosen: np.ndarray, of: np.ndarray, device: torch.device) -> torch.Tensor:
        """Forward of the examples `chosen`: their part of the loss, which is a mean over all of the batch `of`.

        So the parts of all ranks and micro batches add up to that mean, however the batch is divided.
        """
        return self.summed_loss(model, self.collate(chosen).to(device)) / self.normaliser(of)

    @abstractmethod
    def longest_batch(self, vocab_size: int) -> MicroBatch:
        """The largest micro batch the recipe allows, for a plan."""

    def validation(self, engine: Engine) -> Validation | None:
        """What scores the model as it trains; None: it is saved as it is at the end."""
        return None

    # ---- in a comparison

    def compared_losses(
        self, entry: Mapping[str, Any], load: Callable[[], tuple[nn.Module, Any]]
    ) -> dict[str, float | None]:
        """{"validation", "test"} of a run: the first chooses between runs (lower is better), the second is reported.

        entry: what the run's own validation wrote into results.json; empty for the untrained model. load: returns the
        trained model and its tokenizer. UserError: an objective that is not compared.
        """
        raise UserError(f"objective {self.name}: its runs are not compared; give a recipe with a task")

    # ---- other runs beside this one

    def before(self) -> Recipe | None:
        """A run that is to be made first, to compare with."""
        return None


def objective_class(task: str | None, name: str) -> type[Objective]:
    """The objective of a recipe's `task`, or, with own data, the one called `name`."""
    found: type[Objective] = OBJECTIVES.load(get_task(task).objective if task else name)
    return found


def make_objective(recipe: Recipe) -> Objective:
    """The recipe's objective."""
    return objective_class(recipe.task, recipe.objective.name)(recipe)
