"""The classifier alone, over the encoder as it is: what an adapter has to beat."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from neuroada.errors import UserError
from neuroada.files import StoredTensor
from neuroada.methods.base import EVERYWHERE, Change
from neuroada.methods.peft_method import PeftMethod


class Head(PeftMethod):
    name = "head"
    prefix = "lora_"  # PEFT's LoRA without any target: only the classifier trains
    strategies = EVERYWHERE

    @classmethod
    def changes(cls, saved: Path, base: Mapping[str, StoredTensor]) -> Iterator[Change]:
        return iter(())  # no weight of the encoder

    def describe(self) -> str:
        return "classifier alone"

    def config(self, task_type: str) -> LoraConfig:
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, task_type=task_type)  # PEFT's name for no target

    def attach(self, model: nn.Module, task_type: str) -> nn.Module:
        if task_type != "SEQ_CLS":
            raise UserError(
                f"adapter.method = head: {type(model).__name__} has no classifier to train alone; use a glue/ task"
            )
        return super().attach(model, task_type)
