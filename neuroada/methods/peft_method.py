"""What methods that are PEFT tuners share."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from neuroada.adapter.saved import save_adapter
from neuroada.files import StoredTensor, open_tensors
from neuroada.hf.head import train_head_in_fp32
from neuroada.methods.base import Change, Method

KEY_PREFIX = "base_model.model."
"""PEFT's, of every key of an adapter's file."""

USAGE = """from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained({base})
model = PeftModel.from_pretrained(model, "THIS_REPOSITORY").merge_and_unload()  # inference costs nothing then
"""


class PeftMethod(Method):
    """A PEFT tuner: `config` says which.

    prefix: of the names of the parameters it adds. values: the ending of the tensors in its file that are added to
    entries of a weight.
    """

    prefix: ClassVar[str]
    values: ClassVar[str]
    usage = USAGE

    @abstractmethod
    def config(self, task_type: str) -> PeftConfig:
        """PEFT's configuration. With task_type SEQ_CLS, PEFT trains and saves the classifier too."""

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        tuned: nn.Module = get_peft_model(model, self.config(task_type), autocast_adapter_dtype=True)
        train_head_in_fp32(tuned)
        return tuned

    def save(self, model: nn.Module, folder: Path) -> None:
        peft_model: Any = model
        peft_model.peft_config["default"].base_model_name_or_path = self.recipe.model
        save_adapter(peft_model, folder)

    @classmethod
    def changes(cls, saved: Path, base: Mapping[str, StoredTensor]) -> Iterator[Change]:
        with open_tensors(saved / SAFETENSORS_WEIGHTS_NAME) as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if key.endswith(cls.values):
                    values = file.get_tensor(key).float()
                    module = key.removeprefix(KEY_PREFIX).removesuffix(cls.values)
                    yield Change(module, float(values.square().sum()), values.numel())

    def checkpoint_has(self, name: str) -> bool:
        return f".{self.prefix}" not in name

    def kind(self, name: str) -> str:
        return "delta" if f".{self.prefix}" in name else "weights"

    @property
    def targets(self) -> list[str]:
        return list(self.adapter.target_modules)
