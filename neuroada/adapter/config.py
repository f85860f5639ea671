"""NeuroAda's PEFT configuration."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from peft import PeftConfig

from neuroada.adapter.card import write_note
from neuroada.adapter.neurons import NeuronChoice
from neuroada.adapter.selection import Selection
from neuroada.errors import UserError


def k_of(module: str, k: int, k_pattern: Mapping[str, int] | None) -> int:
    """The k of the module of this name: that of the first pattern which matches its end or all of it, else `k`."""
    for pattern, other in (k_pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return other
    return k


class NeuroAdaType(StrEnum):
    """PEFT's own PeftType is closed; a str enum with the same interface stands in (its error paths read `.value`)."""

    NEUROADA = "NEUROADA"


@dataclass
class NeuroAdaConfig(PeftConfig):
    """k trained connections for every neuron of the target modules.

    Args:
        k: trained connections of each neuron (row of a Linear weight), 1 <= k <= in_features.
        selection: how they are chosen: magnitude (largest |w|, the method), gradient (largest |dL/dw| of a batch the
            caller runs: see `select_by_gradient`), wanda (largest |w| x norm of the inputs, of batches the caller runs:
            see `select_by_activations`), lift (largest |entries| of the weight's best approximation of a low rank),
            reverse (smallest |w|) and random (from `seed`) for ablations.
        lift_rank: that rank, of selection = lift.
        target_modules: names of Linear modules: each the whole name, or its end after a dot; or one regular expression
            for the whole name; or "all-linear", every Linear but the output head.
        target_parameters: names of experts' parameters [experts, ., .], read the same way, such as
            "experts.gate_up_proj"; k connections of every neuron of every expert.
        exclude_modules: names to leave out, read the same way.
        k_pattern: another k for some modules: name or regular expression -> k; the first that matches a module's name,
            or its end after a dot.
        modules_to_save: modules trained and saved whole beside the adapter, such as a classifier.
        layers_to_transform: numbers of the layers to adapt; all, if None.
        layers_pattern: what stands before the number in a layer's name, where that is unusual.
        trainable_token_indices: tokens whose embeddings train too: a list, or a dictionary from an embedding's name.
        init_weights: start from the base (deltas of zero). False: from noise, for tests.
        neuron_fraction: the part of each layer's neurons that trains; the deltas of the others stay 0, and take as much
            memory and file as those that train.
        neuron_choice: which neurons those are: random (from `seed`) or norm (those whose weights have the largest L2
            norm).
        seed: of selection = random and neuron_choice = random.
        base_fingerprint: written with a trained adapter: a checksum of the base weights under its connections, compared
            when it is loaded. Set it to None to load the adapter over other weights on purpose.
        connections_sha256: written with a saved adapter: of its indices and deltas, compared when its file is read.
    """

    k: int = field(default=20, metadata={"help": "trained connections of each neuron"})
    selection: Selection = field(default="magnitude", metadata={"help": " | ".join(get_args(Selection))})
    lift_rank: int = field(default=128, metadata={"help": "of selection = lift: rank of the approximation"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear modules to adapt"})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "experts' parameters to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave out"})
    k_pattern: dict[str, int] | None = field(default=None, metadata={"help": "another k for some modules"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained whole"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "numbers of the layers"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "what stands before the number"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "tokens whose embeddings train too"}
    )
    init_weights: bool = field(default=True, metadata={"help": "start from the base; False: from noise, for tests"})
    neuron_fraction: float = field(default=1.0, metadata={"help": "the part of each layer's neurons that trains"})
    neuron_choice: NeuronChoice = field(default="random", metadata={"help": "random | norm: which neurons"})
    seed: int = field(default=0, metadata={"help": "of selection = random and neuron_choice = random"})
    base_fingerprint: str | None = field(default=None, metadata={"help": "checksum of the base under the connections"})
    connections_sha256: str | None = field(default=None, metadata={"help": "checksum of the indices and deltas"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NeuroAdaType.NEUROADA
        # What goes into the file that is written next, and into no other: the object is the caller's.
        self.trained_on: str | None = None
        self.saved_sha256: str | None = None
        for label, k in [("k", self.k), *((f"k_pattern[{name!r}]", k) for name, k in (self.k_pattern or {}).items())]:
            if not isinstance(k, int) or isinstance(k, bool) or k < 1:
                raise UserError(f"{label} = {k!r}: must be a whole number of at least 1")
        if self.selection not in get_args(Selection):
            raise UserError(f"selection = {self.selection!r}: must be one of {', '.join(get_args(Selection))}")
        if not isinstance(self.lift_rank, int) or isinstance(self.lift_rank, bool) or self.lift_rank < 1:
            raise UserError(f"lift_rank = {self.lift_rank!r}: must be a whole number of at least 1")
        self._check_neurons()
        if isinstance(self.target_parameters, str):
            raise UserError(f"target_parameters = {self.target_parameters!r}: must be a list of names")
        # As PEFT's own: a set has no order to depend on; its files are sorted.
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} = {getattr(self, name)!r}: cannot join target_modules = {self.target_modules!r}; put "
                        f"the layers into the expression, or give a list of names"
                    )
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise UserError(f"layers_pattern = {self.layers_pattern!r}: needs layers_to_transform; name the layers")

    def _check_neurons(self) -> None:
        fraction = self.neuron_fraction
        if not isinstance(fraction, int | float) or isinstance(fraction, bool) or not 0 < fraction <= 1:
            raise UserError(f"neuron_fraction = {fraction!r}: must be a number above 0, up to 1")
        if self.neuron_choice not in get_args(NeuronChoice):
            raise UserError(
                f"neuron_choice = {self.neuron_choice!r}: must be one of {', '.join(get_args(NeuronChoice))}"
            )
        if fraction < 1 and not self.init_weights:
            raise UserError(f"neuron_fraction = {fraction}: frozen neurons start at 0; leave init_weights = False out")

    def k_of(self, module: str) -> int:
        """The k of the module of this name."""
        return k_of(module, self.k, self.k_pattern)

    def to_dict(self) -> dict[str, Any]:
        """As it is written: with the checksum of the base that the adapter's connections were chosen on."""
        found = super().to_dict() | {
            "base_fingerprint": self.trained_on or self.base_fingerprint,
            "connections_sha256": self.saved_sha256,
        }
        return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        if self.trained_on or self.saved_sha256:  # an adapter is being saved, not a configuration alone
            write_note(Path(save_directory))
        self.trained_on = self.saved_sha256 = None
