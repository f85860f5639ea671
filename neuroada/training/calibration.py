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

    def on(
        self, engine: Engine, model: nn.Module, before_pass: Callable[[int, int, float], None]
    ) -> "ExampleCalibration":
        """The loaded model that the passes are to run on.

        before_pass: called before each pass that this rank runs with its number, from 0, the number of passes, and the
        share of all their tokens that is in those before it: 0 to 1.
        """
        self.engine, self.model, self.before_pass = engine, model, before_pass
        return self

    def forwards(self) -> list[Callable[[], object]]:
        return self._passes(self._forward)

    def backwards(self) -> list[Callable[[], object]]:
        return self._passes(self._backward)

    def _passes(self, run: Callable[[np.ndarray, np.ndarray, int], None]) -> list[Callable[[], object]]:
        batch, lengths = self.objective.batch(0, self.examples), self.objective.data.lengths
        # The longest first: what does not fit into memory fails at once, and the time that is left is told from them.
        passes = list(share(batch, lengths, rank=0, world_size=1, micro=PASS))[::-1]
        tokens = np.cumsum([0, *(lengths[chosen].sum() for chosen in passes)])

        def one(number: int, chosen: np.ndarray) -> None:
            self.before_pass(number, len(passes), float(tokens[number] / tokens[-1]))
            run(chosen, batch, number)
            self.engine.release()

        return [partial(one, number, chosen) for number, chosen in enumerate(passes)]

    def _forward(self, chosen: np.ndarray, batch: np.ndarray, number: int) -> None:
        with evaluating(self.model):
            self.objective.loss(self.model, chosen, chosen, self.engine.device)

    def _backward(self, chosen: np.ndarray, batch: np.ndarray, number: int) -> None:
        torch.manual_seed(hash((self.seed, number)) & 0x7FFF_FFFF)  # of dropout, the same on every rank
        # Not through the engine, which would count this pass as a part of a step.
        self.objective.loss(self.model, chosen, batch, self.engine.device).backward()
