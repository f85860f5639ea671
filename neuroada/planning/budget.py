"""Budgets matched by the tool: the value of a method's own size field that trains nearest to a wanted number."""

from dataclasses import dataclass
from typing import Any

from neuroada.config.recipe import Recipe
from neuroada.engines import base_parameters
from neuroada.errors import UserError
from neuroada.hf.config import find_config
from neuroada.methods import make_method
from neuroada.objectives import make_objective
from neuroada.planning.meta_model import on_meta

EXAMPLE = "trainable=0.02% of the base's parameters, or trainable=3110400"


@dataclass(frozen=True)
class Budget:
    """How much is to train. `told`: as the user gave it."""

    told: str
    share: float | None = None  # of the base model's parameters
    number: int | None = None

    @classmethod
    def read(cls, text: str) -> "Budget":
        """`trainable=0.02%` or `trainable=3110400`. UserError for anything else."""
        field, _, value = text.partition("=")
        try:
            if field == "trainable" and value.endswith("%") and 0 < float(value[:-1]) <= 100:
                return cls(text, share=float(value[:-1]) / 100)
            if field == "trainable" and int(value) > 0:
                return cls(text, number=int(value))
        except ValueError:
            pass
        raise UserError(f"--match {text}: must be {EXAMPLE}")

    def of(self, parameters: int) -> int:
        """How many numbers that is, of a base model with so many."""
        return self.number if self.share is None else round(self.share * parameters)  # type: ignore[return-value]


def match(recipe: Recipe, budget: Budget) -> dict[str, Any]:
    """The fields of the adapter section that bring the recipe's method nearest to `budget`, a classifier included; {}
    for a method without a size of its own. On the meta device.

    UserError: the model's configuration is nowhere, or its shapes do not take the method.
    """
    config, _ = find_config(recipe.model)
    objective = make_objective(recipe)

    def attached(fields: dict[str, Any]) -> tuple[int, int]:
        """(trainable, the base's parameters) with these fields."""
        changed = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update=fields)})
        method = make_method(changed)
        model = on_meta(config, changed, method, objective)
        return method.trainable(model), base_parameters(model)

    method = make_method(recipe)
    if not method.sizes:
        return {}
    wanted = budget.of(attached({})[1])
    return method.match(wanted, lambda fields: attached(fields)[0])
