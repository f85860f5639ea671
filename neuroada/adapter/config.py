"""NeuroAda's PEFT configuration."""

from dataclasses import dataclass, field
from enum import StrEnum

from peft import PeftConfig

from neuroada.adapter.selection import Selection
from neuroada.errors import UserError


class NeuroAdaType(StrEnum):
    """PEFT's own PeftType is closed; a str enum with the same interface stands in (its error paths read `.value`)."""

    NEUROADA = "NEUROADA"


@dataclass
class NeuroAdaConfig(PeftConfig):
    """k trained connections for every neuron of the target modules.

    Args:
        k: trained connections of each neuron (row of a Linear weight), 1 <= k <= in_features.
        selection: how they are chosen: magnitude (largest |w|, the method), gradient (largest |dL/dw| of a batch the
            caller runs: see `select_by_gradient`), reverse (smallest |w|) and random (from `seed`) for ablations.
        target_modules: names of Linear modules: each the whole name, or its end after a dot; or one regular expression
            for the whole name.
        target_parameters: names of experts' parameters [experts, ., .], read the same way, such as
            "experts.gate_up_proj"; k connections of every neuron of every expert.
        exclude_modules: names to leave out, read the same way.
        modules_to_save: modules trained and saved whole beside the adapter, such as a classifier.
        seed: of selection = random.
        base_fingerprint: written with a trained adapter: a checksum of the base weights under its connections, compared
            when it is loaded. Set it to None to load the adapter over other weights on purpose.
    """

    k: int = field(default=20, metadata={"help": "trained connections of each neuron"})
    selection: Selection = field(default="magnitude", metadata={"help": "magnitude | gradient | reverse | random"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear modules to adapt"})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "experts' parameters to adapt"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "modules to leave out"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules trained whole"})
    seed: int = field(default=0, metadata={"help": "of selection = random"})
    base_fingerprint: str | None = field(default=None, metadata={"help": "checksum of the base under the connections"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NeuroAdaType.NEUROADA
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise UserError(f"k = {self.k!r}: must be a whole number of at least 1")
        choices = ("magnitude", "gradient", "reverse", "random")
        if self.selection not in choices:
            raise UserError(f"selection = {self.selection!r}: must be one of {', '.join(choices)}")
        if isinstance(self.target_parameters, str):
            raise UserError(f"target_parameters = {self.target_parameters!r}: must be a list of names")
