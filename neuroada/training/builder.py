"""From a recipe to its model, in the form an engine asks for: what ties method, objective and model files together."""

import torch
from torch import nn

from neuroada.config.recipe import Recipe
from neuroada.errors import UserError
from neuroada.hf.attention import choose_attention
from neuroada.hf.attention_sinks import has_sinks
from neuroada.hf.loading import DTYPES, build_empty, load_config, load_pretrained
from neuroada.hf.quantised import choose_quantisation, declared_quantised, load_quantised, without_zero_init
from neuroada.methods import Method, make_method
from neuroada.objectives import Objective, make_objective


class RecipeModelBuilder:
    """An `engines.ModelBuilder`."""

    def __init__(self, recipe: Recipe, method: Method, objective: Objective, compute: torch.dtype) -> None:
        self.recipe, self.method, self.objective = recipe, method, objective
        self.source, self.dtype = recipe.model, method.storage_dtype(compute)
        config = load_config(recipe.model)
        self.sinks = has_sinks(config)
        self.quantisation = choose_quantisation(recipe, config)
        if self.quantisation is not None:
            method.check_quantised(self.quantisation)
            if objective.task_type != "CAUSAL_LM":
                raise UserError(
                    f"base.model_dtype: task {recipe.task} has a classifier, whose base is not quantised; leave it out"
                )

    @classmethod
    def of(cls, recipe: Recipe) -> "RecipeModelBuilder":
        """With the recipe's own method, objective and dtype."""
        return cls(recipe, make_method(recipe), make_objective(recipe), DTYPES[recipe.train.dtype])

    def pretrained(self, device: torch.device) -> nn.Module:
        if self.quantisation is not None:
            with without_zero_init():
                empty = self.empty(device)
            return load_quantised(empty, self.source, device)
        auto, options = self.objective.auto_class()
        attention = self._attention(device)
        return load_pretrained(auto, self.source, options=options, dtype=self.dtype, attn_implementation=attention)

    def empty(self, device: torch.device) -> nn.Module:
        auto, options = self.objective.auto_class()
        model = build_empty(auto, self.source, self.dtype, self._attention(device), options)
        return model if self.quantisation is None else declared_quantised(model, self.quantisation)

    def attach(self, base: nn.Module) -> nn.Module:
        return self.method.attach(base, self.objective.task_type)

    def checkpoint_has(self, name: str) -> bool:
        return self.method.checkpoint_has(name) and self.objective.checkpoint_has(name)

    def initialise(self, model: nn.Module) -> None:
        self.method.initialise(model)

    def _attention(self, device: torch.device) -> str:
        return choose_attention(self.recipe.train.packed, self.recipe.train.dtype, device, self.sinks)
