"""BitFit: the model's own biases, and nothing else."""

from torch import nn

from neuroada.errors import UserError
from neuroada.hf.head import in_head
from neuroada.methods.base import EVERYWHERE
from neuroada.methods.whole_weights import WholeWeights


class BitFit(WholeWeights):
    name = "bitfit"
    strategies = EVERYWHERE

    def describe(self) -> str:
        return "BitFit, all biases"

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        model.requires_grad_(False)
        biases = 0
        for name, param in model.named_parameters():
            head = task_type == "SEQ_CLS" and in_head(name)  # trained whole, as beside an adapter
            biases += (is_bias := name.endswith("bias"))
            param.requires_grad_(head or is_bias)
        if not biases:
            raise UserError(f"adapter.method = bitfit: {type(model).__name__} has no biases; use another method")
        return model
