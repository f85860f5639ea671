"""What methods that train the model's own weights share: fp32 storage, autocast, an ordinary checkpoint as a result."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neuroada import sharding
from neuroada.files import StoredTensor, new_folder, open_tensors, weight_files
from neuroada.hf.loading import DTYPES
from neuroada.methods.base import Change, Method
from neuroada.tasks.table import get_task


class WholeWeights(Method):
    """The model's own weights train, in adapter.trainable_dtype, computing in train.dtype by autocast."""

    folder = "model"
    library = "transformers"
    usage = """from transformers import {auto}

model = {auto}.from_pretrained("THIS_REPOSITORY")
"""

    def refusal(self, strategy: str) -> str | None:
        if strategy == "fsdp2" and self.recipe.task is not None and get_task(self.recipe.task).num_labels:
            return (
                f"adapter.method = {self.name}: does not run under fsdp2 with task {self.recipe.task}: the classifier "
                f"is in no file that this engine could read; use an engine other than fsdp2"
            )
        return super().refusal(strategy)

    def storage_dtype(self, compute: torch.dtype) -> torch.dtype:
        return DTYPES[self.adapter.trainable_dtype]  # fp32 unless told otherwise: small steps vanish in bf16 weights

    def prepare(self, model: nn.Module, device: torch.device, compute: torch.dtype) -> None:
        if compute != self.storage_dtype(compute):
            model.forward = torch.autocast(device.type, compute)(model.forward)

    @classmethod
    def changes(cls, saved: Path, base: Mapping[str, StoredTensor]) -> Iterator[Change]:
        """Of the matrices inside numbered layers: the entries that differ from the base's are those that train."""
        for name, after in weight_files(saved).items():
            if name not in base or len(after.shape) != 2 or not re.search(r"\.\d+\.", name):
                continue
            change = _read(after) - _read(base[name])
            yield Change(name.removesuffix(".weight"), float(change.square().sum()), int(change.count_nonzero()))

    def save(self, model: nn.Module, folder: Path) -> None:
        """A Hugging Face checkpoint in train.dtype, one parameter gathered at a time."""
        dtype = DTYPES[self.recipe.train.dtype]
        first = not dist.is_initialized() or dist.get_rank() == 0
        state: dict[str, torch.Tensor] = {}
        for name, param in model.named_parameters():
            if self.kind(name) != "weights":  # a mask
                continue
            with sharding.whole(param) as value:
                if first:
                    state[name] = value.detach().to("cpu", dtype, copy=True)
        if first:
            transformer: Any = model
            transformer.config.dtype = dtype
            with new_folder(folder, replace=True) as partial:
                transformer.save_pretrained(partial, state_dict=state)


def _read(stored: StoredTensor) -> torch.Tensor:
    with open_tensors(stored.file) as opened:
        return opened.get_tensor(stored.name).float()
