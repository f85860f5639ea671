"""From a recipe to its model, in the form an engine asks for: what ties method, objective and model files together."""

import torch
from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.hf.attention import choose_attention
from neuroada.hf.loading import DTYPES, build_empty, load_pretrained
from neuroada.methods import Method, make_method
from neuroada.objectives import Objective, make_objective


class RecipeModelBuilder:
    """An `engines.ModelBuilder`."""

    def __init__(self, recipe: Recipe, method: Method, objective: Objective, compute: torch.dtype) -> None:
        self.recipe, self.method, self.objective = recipe, method, objective
        self.source, self.dtype = recipe.model, method.storage_dtype(compute)

    @classmethod
    def of(cls, recipe: Recipe) -> "RecipeModelBuilder":
        """With the recipe's own method, objective and dtype."""
        return cls(recipe, make_method(recipe), make_objective(recipe), DTYPES[recipe.train.dtype])

    def pretrained(self, device: torch.device) -> nn.Module:
        auto, options = self.objective.auto_class()
        attention = self._attention(device)
        return load_pretrained(auto, self.source, options=options, dtype=self.dtype, attn_implementation=attention)

    def empty(self, device: torch.device) -> nn.Module:
        auto, options = self.objective.auto_class()
        return build_empty(auto, self.source, self.dtype, self._attention(device), options)

    def attach(self, base: nn.Module) -> nn.Module:
        return self.method.attach(base, self.objective.task_type)

    def checkpoint_has(self, name: str) -> bool:
        return self.method.checkpoint_has(name) and self.objective.checkpoint_has(name)

    def initialise(self, model: nn.Module) -> None:
        self.method.initialise(model)

    def _attention(self, device: torch.device) -> str:
        return choose_attention(self.recipe.train.packed, self.recipe.train.dtype, device)
