"""PEFT tuners whose indices are not parameters: whole on every rank, and saved by PEFT itself."""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from neuroada.files import new_folder
from neuroada.methods.peft_method import PeftMethod


class UnshardedPeftMethod(PeftMethod):
    def save(self, model: nn.Module, folder: Path) -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        peft_model: Any = model
        peft_model.peft_config["default"].base_model_name_or_path = self.recipe.model
        with new_folder(folder, replace=True) as partial:
            peft_model.save_pretrained(partial, save_embedding_layers=False)
