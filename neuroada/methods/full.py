"""Full fine-tuning: every weight of the model, embeddings too."""

from torch import nn

from neuroada.methods.base import EVERYWHERE
from neuroada.methods.whole_weights import WholeWeights


class Full(WholeWeights):
    name = "full"
    strategies = EVERYWHERE

    def describe(self) -> str:
        return "full fine-tuning"

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        return model.requires_grad_(True)
