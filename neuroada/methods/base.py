"""The interface of a method, and the part that all methods share.

A new method is a subclass of `Method`, or of `PeftMethod` where PEFT has it, and a line in neuroada/registry.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import nn

from neuroada import sharding
from neuroada.config.fields import Adapter
from neuroada.config.recipe import Recipe
from neuroada.errors import UserError
from neuroada.files import StoredTensor
from neuroada.quantised import Quantisation
from neuroada.registry import METHODS

if TYPE_CHECKING:
    from neuroada.engines import Engine

WHOLE = ("single", "zero0", "zero1", "zero2")
"""Strategies under which every rank stores every parameter whole."""
EVERYWHERE = (*WHOLE, "zero3", "fsdp2")
OPTIONAL = {
    "exclude_modules": "neuroada, lora and dora",
    "layers": "neuroada, lora and dora",
    "neuron_fraction": "neuroada",
    "delta_dtype": "neuroada",
    "random_scope": "random_entries",
}
"""Fields of the adapter section that some methods follow, and the others refuse rather than leave unread."""


class Change(NamedTuple):
    """How far one weight moved: the sum of squares of its change, over `entries` that train."""

    module: str
    squared: float
    entries: int


class Calibration(Protocol):
    """The training examples that a method may choose by, adapter.calibration_examples of them, in passes of a few.

    The passes depend on the recipe alone: every rank has all of them, the same for any engine and world size.
    """

    def forwards(self) -> list[Callable[[], object]]:
        """Each runs the model on one pass, as it is evaluated."""

    def backwards(self) -> list[Callable[[], object]]:
        """Each runs the model, not the engine around it, on one pass, and the backward of its part of their loss."""


class Method(ABC):
    """What trains: attached to a base model, saved as an adapter or as a model.

    strategies: the engines' strategies it runs under.
    folder: of the run, where the result is saved: adapter (PEFT's format) or model (an ordinary checkpoint).
    library: the hub's name for what loads the result.
    selects: whether it chooses connections: adapter.selection_file belongs to methods that do.
    usage: Python lines that load the result, for the model card; {auto}, {base} (with its quotes) and THIS_REPOSITORY
        are filled in.
    """

    name: ClassVar[str]
    strategies: ClassVar[tuple[str, ...]] = WHOLE
    follows: ClassVar[frozenset[str]] = frozenset()  # which of `OPTIONAL`
    adapts_experts: ClassVar[bool] = False  # by adapter.target_parameters
    sizes: ClassVar[str | None] = None  # the field of the adapter section that says how much trains
    folder: ClassVar[Literal["adapter", "model"]] = "adapter"
    library: ClassVar[str] = "peft"
    selects: ClassVar[bool] = False
    usage: ClassVar[str]

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.adapter, self.seed = recipe, recipe.adapter, recipe.train.seed

    @abstractmethod
    def describe(self) -> str:
        """The method and its budget in words, such as "NeuroAda, k = 20"."""

    @abstractmethod
    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        """Freeze the base `model` and add what trains; on the meta device too, where values come later.

        task_type: PEFT's name of the objective, CAUSAL_LM or SEQ_CLS.
        """

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write what was trained into `folder`. Collective; rank 0 writes."""

    def check(self, strategy: str) -> None:
        """Refuse, before a weight is loaded, what the method cannot do.

        Raises:
            UserError: the engine's strategy, or a field of the recipe, and the reason.
        """
        if self.adapter.selection_file is not None and not self.selects:
            raise UserError(f"adapter.selection_file: method {self.name} chooses no connections; leave it out")
        for field, owners in OPTIONAL.items():
            value = getattr(self.adapter, field)
            if value != Adapter.model_fields[field].default and field not in self.follows:
                raise UserError(f"adapter.{field} = {value}: is of {owners}, not of {self.name}; leave it out")
        if (fraction := self.adapter.neuron_fraction) < 1 and self.adapter.target_parameters:
            raise UserError(
                f"adapter.neuron_fraction = {fraction}: not for experts; leave adapter.target_parameters out"
            )
        if (refused := self.refusal(strategy)) is not None:
            raise UserError(refused)
        if self.adapter.target_parameters and not self.adapts_experts:
            raise UserError(f"adapter.target_parameters: method {self.name} does not adapt experts; use neuroada")
        if self.adapter.target_parameters and (self.adapter.selects_later or self.adapter.selection == "lift"):
            raise UserError(
                "adapter.target_parameters: experts' connections are chosen by their weights; use selection magnitude, "
                "reverse or random, and no selection_file"
            )

    def refusal(self, strategy: str) -> str | None:
        """Why this recipe does not run under a strategy: one line with the field and the remedy. None: it does.

        A plan leaves such strategies out; it has kinds of them, such as zero3_offload.
        """
        if strategy.partition("_")[0] in self.strategies:
            return None
        others = " or ".join(name for name in self.strategies if name != "zero0")
        return f"adapter.method = {self.name}: does not run under {strategy}; use {others}"

    def check_quantised(self, quantisation: Quantisation) -> None:
        """Refuse a quantised base. UserError, unless the method trains beside weights that it only reads."""
        raise UserError(
            f"adapter.method = {self.name}: does not run over a quantised base ({quantisation.describe()}); use "
            f"neuroada, or an unquantised model without base.model_dtype"
        )

    def storage_dtype(self, compute: torch.dtype) -> torch.dtype:
        """The dtype that the base model's weights are loaded in, where the recipe computes in `compute`."""
        return compute

    def prepare(self, model: nn.Module, device: torch.device, compute: torch.dtype) -> None:
        """Make the loaded model compute in `compute`, where that is not the dtype of its weights."""

    def initialise(self, model: nn.Module) -> None:
        """Set what `attach` added, of a model that was built without values and has its base's by now. Collective."""

    def choose(self, engine: "Engine", model: nn.Module, calibration: Calibration) -> None:
        """Choose what trains, where that takes examples. Collective."""

    @classmethod
    def changes(cls, saved: Path, base: Mapping[str, StoredTensor]) -> Iterator[Change]:
        """How far each weight moved, from the files in the run's folder `saved`; one weight in memory at a time.

        base: the base model's tensors by name; empty where its files are not here.
        """
        return iter(())

    def checkpoint_has(self, name: str) -> bool:
        """Whether this parameter of the attached model has its values from the base model's files."""
        return True

    def kind(self, name: str) -> str:
        """What a parameter is, for a plan: weights, or what the method adds to them (idx, delta, mask)."""
        return "weights"

    def whole_indices(self, model: nn.Module) -> int:
        """Bytes of indices that are no parameters: every rank holds those of every layer, whatever the engine."""
        return 0

    def base_fingerprint(self, model: nn.Module) -> str | None:
        """A checksum of the base weights that are tuned, for a resumed run to compare; None: the model's name must do.
        Collective."""
        return None

    def match(self, budget: int, count: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
        """The value of the field `sizes` with which nearest to `budget` numbers train: {field: value}, at least 1.

        count: how many train with these values of fields. Of a method whose count grows by the same with every step.
        """
        if self.sizes is None:
            return {}
        one, two = (count({self.sizes: value}) for value in (1, 2))
        return {self.sizes: max(1, 1 + round((budget - one) / (two - one)))}

    def trainable(self, model: nn.Module) -> int:
        """How many trainable parameters: numbers that training can change."""
        return sum(sharding.shape(param).numel() for param in model.parameters() if param.requires_grad)


def make_method(recipe: Recipe, name: str | None = None) -> Method:
    """The recipe's method; or the one called `name`, with the recipe's fields."""
    made: Any = METHODS.load(name or recipe.adapter.method)
    return made(recipe)
