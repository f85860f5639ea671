"""The names that a recipe may use for a method, an objective or an engine, and the class behind each.

A registry holds "module:Class" and imports it when it is asked for: checking a recipe must not pay for torch and PEFT.
A package outside of this one adds its own by an entry point of the registry's group, in its pyproject.toml:

    [project.entry-points."neuroada.methods"]
    mine = "my_package.method:Mine"
"""

import difflib
import importlib
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from neuroada.errors import UserError


class Registry:
    """Names of one kind of thing. `field`: the recipe's field that chooses among them."""

    def __init__(self, field: str, group: str, known: dict[str, str]) -> None:
        self.field, self.group, self._known = field, group, known

    @cached_property
    def _installed(self) -> dict[str, str]:
        """Those of other installed packages."""
        return {entry.name: entry.value for entry in entry_points(group=self.group)}

    def names(self) -> list[str]:
        return [*self._known, *(name for name in self._installed if name not in self._known)]

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._installed

    def check(self, name: str) -> str:
        """The name itself. ValueError, with the nearest names, if there is no such thing."""
        if name in self:
            return name
        near = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(self.names())}"
        raise ValueError(f"{self.field} = {name!r}: {hint}")

    def load(self, name: str) -> Any:
        """The class called `name`. UserError if there is none."""
        try:
            self.check(name)
        except ValueError as error:
            raise UserError(str(error)) from None
        module, _, attribute = (self._known.get(name) or self._installed[name]).partition(":")
        return getattr(importlib.import_module(module), attribute)


METHODS = Registry(
    "adapter.method",
    "neuroada.methods",
    {
        "neuroada": "neuroada.methods.neuroada:NeuroAda",
        "lora": "neuroada.methods.lora:Lora",
        "dora": "neuroada.methods.dora:Dora",
        "bitfit": "neuroada.methods.bitfit:BitFit",
        "shira": "neuroada.methods.shira:Shira",
        "random_entries": "neuroada.methods.random_entries:RandomEntries",
        "supertuning": "neuroada.methods.supertuning:SuperTuning",
        "masked": "neuroada.methods.masked:Masked",
        "full": "neuroada.methods.full:Full",
        "head": "neuroada.methods.head:Head",
    },
)

OBJECTIVES = Registry(
    "the objective",
    "neuroada.objectives",
    {
        "causal_lm": "neuroada.objectives.causal_lm:CausalLM",
        "classification": "neuroada.objectives.classification:Classification",
        "sft": "neuroada.objectives.own_data:SupervisedFineTuning",
        "dpo": "neuroada.objectives.preference:DPO",
        "orpo": "neuroada.objectives.preference:ORPO",
    },
)

ENGINES = Registry(
    "engine.name",
    "neuroada.engines",
    {
        "single": "neuroada.engines.single:SingleEngine",
        "deepspeed": "neuroada.engines.deepspeed:DeepSpeedEngine",
        "fsdp2": "neuroada.engines.fsdp2:Fsdp2Engine",
    },
)
