"""PEFT's LoRA, of adapter.rank and adapter.lora_alpha; and DoRA, which trains the rows' magnitudes besides."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from neuroada.files import StoredTensor, open_tensors
from neuroada.methods.base import WHOLE, Change
from neuroada.methods.peft_method import KEY_PREFIX, PeftMethod


class Lora(PeftMethod):
    name = "lora"
    sizes = "rank"
    prefix = "lora_"
    chooses_places = True
    strategies: ClassVar[tuple[str, ...]] = (*WHOLE, "zero3")
    unsupported = {  # noqa: RUF012 (a constant of the class)
        "fsdp2": "its matrices would have no values: weights are loaded after the adapter is attached"
    }

    def describe(self) -> str:
        return f"LoRA, rank {self.adapter.rank}"

    def config(self, task_type: str) -> LoraConfig:
        rank, alpha = self.adapter.rank, self.adapter.lora_alpha
        return LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, task_type=task_type, **self.places)

    @classmethod
    def changes(cls, saved: Path, base: Mapping[str, StoredTensor]) -> Iterator[Change]:
        config = LoraConfig.from_pretrained(str(saved))
        scale = config.lora_alpha / config.r
        with open_tensors(saved / SAFETENSORS_WEIGHTS_NAME) as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                if not key.endswith(".lora_A.weight"):
                    continue
                a = file.get_tensor(key).float()
                b = file.get_tensor(key.replace(".lora_A.", ".lora_B.")).float()
                # |BA|^2 = trace(B'B AA'), without the product
                squared = scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
                module = key.removeprefix(KEY_PREFIX).removesuffix(".lora_A.weight")
                yield Change(module, squared, len(b) * a.shape[1])
