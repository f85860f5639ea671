"""The training curve equals the textbook form: a dense W + delta on every forward, through autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from neuroada import NeuroAdaConfig
from neuroada.adapter.selection import select_top_k

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Textbook(nn.Module):
    def __init__(self, linear: nn.Linear, k: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.idx = select_top_k(linear.weight.data, k, "magnitude")
        self.delta = nn.Parameter(torch.zeros(self.idx.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.scatter_add(1, self.idx, self.delta), self.bias)


def make_model(bias: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=128, attention_bias=bias, mlp_bias=bias)
    )  # fmt: skip
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(param, std=0.1)
    return model.requires_grad_(False)


def textbook(model: nn.Module, k: int) -> nn.Module:
    for name, module in list(model.named_modules()):
        if name.endswith(tuple(TARGETS)):
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], Textbook(module, k))
    return model


def curve(model: nn.Module, batches: torch.Tensor, accumulate: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1)
    model.train()
    losses = []
    for batch in batches:
        total = 0.0
        for part in batch.chunk(accumulate):
            loss = model(input_ids=part, labels=part).loss / accumulate
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(("k", "bias"), [(1, False), (1, True), (20, False), (20, True)])
def test_curve_equals_the_textbook_form(k: int, bias: bool) -> None:
    base = make_model(bias)
    batches = torch.randint(0, 128, (4, 4, 24), generator=torch.Generator().manual_seed(1)).repeat(5, 1, 1)
    expected = curve(textbook(copy.deepcopy(base), k), batches, accumulate=1)
    assert len(expected) == 20
    assert expected[16] < expected[0] - 0.02  # the same batch: it learns, so equality says something

    def tuned() -> nn.Module:
        return get_peft_model(copy.deepcopy(base), NeuroAdaConfig(k=k, target_modules=TARGETS))

    assert curve(tuned(), batches, accumulate=1) == pytest.approx(expected, rel=1e-5)
    assert curve(tuned(), batches, accumulate=2) == pytest.approx(expected, rel=1e-5)
    checkpointed = tuned()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    assert curve(checkpointed, batches, accumulate=1) == pytest.approx(expected, rel=1e-5)
