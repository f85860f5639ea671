"""The floor of a comparison: the model as it is, with one norm trained, so that backward runs through all of it."""

from pathlib import Path

from torch import nn

from neuroada.methods import Method
from neuroada.planning.layers import decoder_layers
from neuroada.quantised import Quantisation


class Frozen(Method):
    name = "frozen"

    def describe(self) -> str:
        return "frozen base"

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        model.requires_grad_(False)
        norms = [module for name, module in decoder_layers(model)[0].named_modules() if "norm" in name.lower()]
        norms[0].requires_grad_(True)
        return model

    def check_quantised(self, quantisation: Quantisation) -> None:
        """A frozen base may be stored in any form."""

    def save(self, model: nn.Module, folder: Path) -> None:
        raise AssertionError("a frozen base is planned, never trained")
