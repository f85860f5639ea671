"""Sequences end to end in one row lose what they lose below each other, padded."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from neuroada.adapter import NeuroAdaConfig
from neuroada.doctor.check import Check, Found, NotHere, Place, relative
from neuroada.hf.attention import choose_attention
from neuroada.hf.loading import DTYPES
from neuroada.objectives.cross_entropy import answer_loss
from neuroada.objectives.micro_batch import collate_sequences

LENGTHS = (5, 33, 64, 17)


class Packing(Check):
    number = "relative difference of the loss or of delta's gradient, the larger"

    def __init__(self, name: str, dtype: str, limit: float, flash: bool) -> None:
        self.name, self.dtype, self.limit, self.flash = f"packing-{name}", dtype, limit, flash
        self.claim = f"packed rows lose the same as padded ones, in {dtype}, by {name}"

    def run(self, place: Place) -> Found:
        if self.flash and (place.device.type == "cpu" or not is_flash_attn_2_available()):
            raise NotHere("needs a GPU and flash-attn: see requirements-gpu.txt")
        attention = choose_attention(True, self.dtype, place.device) if self.flash else "packed_sdpa"
        padded, padded_gradient = self._loss(place.device, "sdpa", packed=False)
        packed, packed_gradient = self._loss(place.device, attention, packed=True)
        numbers = {"loss": relative(packed, padded), "gradient": relative(packed_gradient, padded_gradient)}
        return Found(max(numbers.values()), self.limit, f"{attention} beside padded sdpa", numbers)

    def _loss(self, device: torch.device, attention: str, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(the loss, the gradients of all deltas as one vector) of the same sequences and values."""
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=256,
        )  # fmt: skip
        config._attn_implementation = attention
        base: Any = LlamaForCausalLM(config)
        base.to(device, DTYPES[self.dtype])
        model: Any = peft.get_peft_model(base, NeuroAdaConfig(k=4, target_modules="all-linear"))
        rng = np.random.default_rng(0)
        sequences = [
            SimpleNamespace(ids=rng.integers(256, size=length, dtype=np.int32), learnt=np.arange(length) > 0)
            for length in LENGTHS
        ]
        batch = collate_sequences(sequences, packed, pad_id=0).to(device)
        loss = answer_loss(model, batch) / sum(LENGTHS)
        loss.backward()
        return loss, torch.cat([param.grad.flatten() for param in model.parameters() if param.requires_grad])
