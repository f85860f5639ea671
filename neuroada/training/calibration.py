"""The training examples that a method chooses its connections by."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.engines import Engine, evaluating
from neuroada.errors import UserError
from neuroada.objectives import Objective
from neuroada.training.sample_order import share

PASS = 8
"""Examples in one forward pass. Not train.micro_batch_size, which may change between two lives of one run: sums over
other passes differ in their last bits, and then in the choice."""


class ExampleCalibration:
    """A `methods.Calibration` of the first adapter.calibration_examples examples in the order of training."""

    def __init__(self, recipe: Recipe, objective: Objective) -> None:
        """Before weights are loaded. UserError: more examples than there are."""
        self.objective, self.seed = objective, recipe.train.seed
        wanted, examples = recipe.adapter.calibration_examples, len(objective.data)
        if wanted != "all" and wanted > examples and recipe.adapter.by_examples:
            raise UserError(
                f"adapter.calibration_examples = {wanted}: the training set has {examples}; use all, or at most as many"
            )
        self.examples = examples if wanted == "all" else wanted

    def on(self, engine: Engine, model: nn.Module) -> "ExampleCalibration":
        """The loaded model that the passes are to run on."""
        self.engine, self.model = engine, model
        return self

    def forwards(self) -> list[Callable[[], object]]:
        return [partial(self._forward, chosen) for chosen in self._passes()]

    def backwards(self) -> list[Callable[[], object]]:
        batch = self.objective.batch(0, self.examples)
        return [partial(self._backward, chosen, batch, number) for number, chosen in enumerate(self._passes())]

    def _passes(self) -> list[np.ndarray]:
        batch = self.objective.batch(0, self.examples)
        return list(share(batch, self.objective.data.lengths, rank=0, world_size=1, micro=PASS))

    def _forward(self, chosen: np.ndarray) -> None:
        with evaluating(self.model):
            self.objective.loss(self.model, chosen, chosen, self.engine.device)
        self.engine.release()

    def _backward(self, chosen: np.ndarray, batch: np.ndarray, number: int) -> None:
        torch.manual_seed(hash((self.seed, number)) & 0x7FFF_FFFF)  # of dropout, the same on every rank
        # Not through the engine, which would count this pass as a part of a step.
        self.objective.loss(self.model, chosen, batch, self.engine.device).backward()
        self.engine.release()
