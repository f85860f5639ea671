"""What the tests of sync share: a model with an adapter, a plain one, and changes of the deltas."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from neuroada import NeuroAdaConfig
from neuroada.sync import Sender

IDS = torch.arange(2, 26).view(2, 12)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tuned(folder: Path, dtype: torch.dtype = torch.float32, **config) -> PeftModel:
    options = {"k": 3, "target_modules": TARGETS, **config}
    return get_peft_model(plain(folder, dtype), NeuroAdaConfig(**options))


def change(model: torch.nn.Module, seed: int, adapter: str = "default") -> None:
    """Random deltas, as after an optimizer step."""
    generator = torch.Generator().manual_seed(seed)
    for name, param in model.named_parameters():
        if f"neuroada_delta.{adapter}" in name:
            param.data = 0.05 * torch.randn(param.shape, generator=generator)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """With gradients enabled, as a trainer computes them."""
    return model(input_ids=IDS).logits.detach()


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter's bytes."""
    return {name: param.detach().clone().view(torch.uint8) for name, param in model.named_parameters()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def checkpoint_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters() if name != "lm_head.weight"}


def merged(trainer: PeftModel) -> dict[str, torch.Tensor]:
    """The trainer's weights as a checkpoint, merged."""
    trainer.merge_adapter()
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): param.detach().clone()
        for name, param in trainer.named_parameters()
        if "neuroada_" not in name and "lm_head" not in name
    }
    trainer.unmerge_adapter()
    return found


def senders(model: torch.nn.Module, parts: int) -> list[Sender]:
    """One a rank, as if `parts` ranks held the whole model (ZeRO-2)."""
    found = [Sender(model) for _ in range(parts)]
    for part, sender in enumerate(found):
        sender.part, sender.parts, sender.stream = part, parts, found[0].stream
    return found
